// The plug-in for llama.cpp behind racdeploy.h: which ggml it fits, what it packs, and how fast it is here.
#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <random>
#include <system_error>
#include <thread>

#include "failure.h"
#include "ggml_plugin.h"
#include "plugin_functions.h"

namespace racdeploy::c {
namespace {

// Those whose private declarations are those of ggml_abi.h: the table of ggml_releases.toml, as a test says.
struct KnownGgml {
    const char *version, *commit;
};
constexpr KnownGgml known_ggml[] = {
    {"0.15.3", "b3fed31b99f9bd37725833674252bccb429bb183"},
    {"0.15.3", "78d2f524682d9fee790a6460c93d018dafeb5229"},
    {"0.16.0", "e3546c7948e3af463d0b401e6421d5a4c2faf565"},
    {"0.20.0", "4df29be4f4c3673f428170fda944a5b19f743bb8"},
    {"0.25.3", "0c1e57098bba43ac29e6e3b677cdceebdd22334f"},
};

constexpr int64_t part_bytes = 4 << 20;  // of a matrix that are read together
constexpr size_t longest_name = 63;      // of a tensor, in ggml

constexpr double never = 2, least_speedup = 1.05, tolerance = 1e-6;
constexpr int64_t trial_rows = 2048, trial_columns = 4096, trial_bytes = 72 << 20;  // more than a cache holds
constexpr int trial_shapes = 12;

struct Packable {
    Quant quant;
    const char* name;
    int code_bits;
};
constexpr Packable packable[] = {{Quant::q8_0, "q8_0", 8},  {Quant::q4_0, "q4_0", 4}, {Quant::f16, "f16", 16},
                                 {Quant::bf16, "bf16", 16}, {Quant::q3_k, "q3_k", 3}, {Quant::q6_k, "q6_k", 6}};

const Packable* find_packable(const Tensor& tensor) {
    const bool is_matrix = tensor.shape.count == 2;
    const bool has_name = tensor.name.size() <= longest_name && tensor.name.find('\0') == std::string::npos;
    for (const Packable& each : packable)
        if (is_matrix && has_name && static_cast<uint32_t>(each.quant) == tensor.type &&
            static_cast<int64_t>(tensor.shape.dimensions[0]) % weights_of_block(each.quant) == 0)
            return &each;
    return nullptr;
}

// Count one matrix, part by part; false after fail().
bool count_one(const Input& input, const Tensor& tensor, const Packable& kind, std::vector<uint8_t>& blocks,
               Zeros& found) {
    const auto columns = static_cast<int64_t>(tensor.shape.dimensions[0]),
               rows = static_cast<int64_t>(tensor.shape.dimensions[1]);
    const int64_t row = row_bytes(kind.quant, columns), together = std::max<int64_t>(1, part_bytes / row);

    found = {tensor.name, tensor.type, true, 0};
    int64_t stored = 0;
    for (int64_t first = 0; first < rows; first += together) {
        const int64_t count = std::min(together, rows - first);
        blocks.resize(static_cast<size_t>(count * row));
        if (!input.read(tensor.position + first * row, blocks.data(), blocks.size())) return false;

        int pattern = 0;
        const int64_t bytes =
            rac_ggml_stored_bytes(static_cast<int>(kind.quant), count, columns, blocks.data(), &pattern);
        if (bytes < 0) throw std::bad_alloc();
        stored += bytes;
        found.two_of_four = found.two_of_four && static_cast<Pattern>(pattern) == Pattern::two_of_four;
    }

    const double weights = static_cast<double>(rows) * static_cast<double>(columns);
    found.share = 1 - 8 * static_cast<double>(stored) / kind.code_bits / weights;
    return true;
}

std::mutex measured_mutex;
bool is_measured = false;
racdeploy_thresholds measured_thresholds;

racdeploy_thresholds built_in_thresholds() {
    // Zen 4, one thread. Q6_K at 2:4 is as fast as ggml's own there.
    if (!std::strcmp(instruction_set(), "avx512")) return {0.3, 0.5, 0.4, 0.7, 0.5, 0.5, 0.5, never};
    return {never, never, never, never, never, never, never, never};  // nobody has measured them
}

bool compare_products(const Packable& kind) {
    std::mt19937 random(0);
    const auto pick = [&](int least, int most) { return std::uniform_int_distribution<int>(least, most)(random); };

    for (int shape = 0; shape < trial_shapes; shape++) {  // first the hard cases: no zeros, all zeros, 2:4
        constexpr int tokens[] = {1, 1, 2, 3, 5, 8, 17, 65};
        const bool is_k = is_k_quant(kind.quant), two_of_four = shape == 2 || shape == 3 || (is_k && shape > 1);
        const int64_t rows = pick(16, 300), columns = two_of_four || is_k ? 256 * pick(1, 10) : 32 * pick(1, 90);
        const double zeros = shape < 2 ? shape : two_of_four ? 0.5 : 0.01 * pick(20, 95);
        const double found = rac_ggml_difference(static_cast<int>(kind.quant), rows, columns, tokens[pick(0, 7)], zeros,
                                                 two_of_four, 1 + shape % 2, static_cast<uint64_t>(shape));
        if (!(found >= 0 && found <= tolerance))
            return fail(RACDEPLOY_ENGINE, "the %s kernels for %s %s: keep the default thresholds", instruction_set(),
                        kind.name,
                        found < 0 ? "do not give weights back as they were written" : "differ from ggml's own");
    }
    return true;
}

// From how many zeros on they are faster; never, where they are not at the most that is tried. False after fail().
bool find_faster(const Packable& kind, bool two_of_four, int threads, double& from) {
    const int64_t matrix = trial_rows * row_bytes(kind.quant, trial_columns);
    const int count = std::max(threads, static_cast<int>(trial_bytes / matrix)) + 1;
    from = never;
    for (const double zeros : {0.8, 0.7, 0.6, 0.5, 0.4, 0.3}) {
        if (two_of_four && zeros != 0.5) continue;
        double stock_ms = 0, sparse_ms = 0;
        rac_ggml_time(static_cast<int>(kind.quant), trial_rows, trial_columns, 1, zeros, two_of_four, count, &threads,
                      1, &stock_ms, &sparse_ms);
        if (std::isnan(stock_ms) || std::isnan(sparse_ms))
            return fail(RACDEPLOY_SYSTEM, "other programs kept the cores busy: measure again, or on fewer threads");
        if (stock_ms < least_speedup * sparse_ms) break;  // so it is at fewer zeros
        from = zeros;
    }
    return true;
}

}  // namespace

std::string why_no_engine() {
    const std::string version = ggml_version(), commit = ggml_commit();
    const std::string digits = commit.substr(0, commit.find('-'));  // a build by pip says more behind a hyphen
    for (const KnownGgml& known : known_ggml) {
        const bool is_commit = digits.size() >= 7 && std::string(known.commit).compare(0, digits.size(), digits) == 0;
        if (is_commit && version == known.version) return "";
    }
    return "ggml " + version + " (" + commit +
           ") is not known as one that the kernels were made for, as that of llama.cpp " +
           known_ggml[std::size(known_ggml) - 1].commit;
}

const char* instruction_set() { return rac_instruction_set(); }

std::string form_of_matrices() { return std::to_string(rac_ggml_layout()) + " " + instruction_set(); }

racdeploy_thresholds known_thresholds() {
    std::lock_guard<std::mutex> lock(measured_mutex);
    return is_measured ? measured_thresholds : built_in_thresholds();
}

bool count_zeros(const Input& input, const Header& header, int threads, std::vector<Zeros>& found) {
    std::vector<std::pair<const Tensor*, const Packable*>> matrices;
    for (const Tensor& tensor : header.tensors)
        if (const Packable* kind = find_packable(tensor)) matrices.emplace_back(&tensor, kind);
    found.assign(matrices.size(), {});

    std::atomic<size_t> next{0};
    std::mutex failed_mutex;
    racdeploy_status failed = RACDEPLOY_OK;
    char message[512] = "";  // what another thread says stays there
    const auto work = [&]() noexcept {
        const racdeploy_status status = guarded([&] {
            std::vector<uint8_t> blocks;
            for (size_t i = next++; i < matrices.size(); i = next++)
                if (!count_one(input, *matrices[i].first, *matrices[i].second, blocks, found[i])) return false;
            return true;
        });
        if (status == RACDEPLOY_OK) return;
        next = matrices.size();
        std::lock_guard<std::mutex> lock(failed_mutex);
        failed = status;
        std::snprintf(message, sizeof(message), "%s", racdeploy_last_error());
    };

    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(threads));
    try {
        for (int t = 1; t < threads; t++) others.emplace_back(work);
    } catch (...) {  // fewer do
    }
    work();
    for (std::thread& other : others) other.join();

    return failed == RACDEPLOY_OK || fail(failed, "%s", message);
}

bool enable_next(const std::vector<std::string>& names, int threads) {
    std::vector<const char*> texts;
    for (const std::string& name : names) texts.push_back(name.c_str());
    return rac_ggml_enable(texts.data(), static_cast<int64_t>(texts.size()), threads) ||
           fail(RACDEPLOY_ENGINE, "a model was loaded in this process before: enable the kernels first");
}

int64_t packed_by_kernels() { return rac_ggml_packed(); }

bool measure(int threads, racdeploy_thresholds& thresholds) {
    if (const std::string reason = why_no_engine(); !reason.empty())
        return fail(RACDEPLOY_ENGINE, "%s", reason.c_str());
    if (!enable_next({}, threads)) return false;
    for (const Packable& kind : packable)
        if (!compare_products(kind)) return false;

    racdeploy_thresholds found;
    if (!find_faster(packable[0], false, threads, found.q8_0) ||
        !find_faster(packable[0], true, threads, found.q8_0_two_of_four) ||
        !find_faster(packable[1], false, threads, found.q4_0) ||
        !find_faster(packable[1], true, threads, found.q4_0_two_of_four) ||
        !find_faster(packable[2], false, threads, found.f16) || !find_faster(packable[3], false, threads, found.bf16) ||
        !find_faster(packable[4], true, threads, found.q3_k_two_of_four) ||
        !find_faster(packable[5], true, threads, found.q6_k_two_of_four))
        return false;

    thresholds = found;
    std::lock_guard<std::mutex> lock(measured_mutex);
    measured_thresholds = thresholds;
    is_measured = true;
    return true;
}

}  // namespace racdeploy::c
