// The functions of racdeploy.h for models: which weights go to the kernels, and from where.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "engine.h"
#include "failure.h"
#include "gguf_header.h"
#include "input.h"
#include "kept_file.h"
#include "kept_paths.h"

using namespace racdeploy::c;

struct racdeploy_model {
    std::string gguf, kept, key;  // the kept file is empty where none is wanted
    bool in_small_pages = false;
    int threads = 1;
    std::vector<std::string> names;
    std::string reason;  // why there are none
};

namespace {

int threads_of(int asked) {
    const auto cores = static_cast<int>(std::thread::hardware_concurrency());
    return std::clamp(asked > 0 ? asked : cores, 1, 64);
}

bool is_container(const Header& header) {
    return std::any_of(header.keys.begin(), header.keys.end(),
                       [](const Key& key) { return key.name.rfind("racgguf.", 0) == 0; });
}

// The field of the struct: a share that is not above 0 says "never", as one above 1 does.
double threshold_of(const racdeploy_thresholds& from, const Zeros& zeros) {
    switch (zeros.type) {
        case 8: return zeros.two_of_four ? from.q8_0_two_of_four : from.q8_0;
        case 2: return zeros.two_of_four ? from.q4_0_two_of_four : from.q4_0;
        case 1: return from.f16;
        case 30: return from.bf16;
        case 11: return zeros.two_of_four ? from.q3_k_two_of_four : 0;
        case 14: return zeros.two_of_four ? from.q6_k_two_of_four : 0;
        default: return 0;
    }
}

std::array<double, 8> shares_of(const racdeploy_thresholds& from) {
    return {from.q8_0, from.q8_0_two_of_four, from.q4_0,             from.f16,
            from.bf16, from.q4_0_two_of_four, from.q3_k_two_of_four, from.q6_k_two_of_four};
}

bool may_be_faster(const racdeploy_thresholds& from) {
    const auto shares = shares_of(from);
    return std::any_of(shares.begin(), shares.end(), [](double share) { return share > 0 && share <= 1; });
}

std::string describe(const racdeploy_thresholds& from) {
    std::string text;
    for (const double share : shares_of(from)) text += std::to_string(share) + " ";
    return text;
}

bool choose(const Input& input, const Header& header, const racdeploy_thresholds& from, racdeploy_model& model) {
    KeptWeights kept;
    if (!model.kept.empty() && kept.find(model.kept, model.key)) {
        model.names = kept.names();
        return true;
    }

    std::vector<Zeros> all;
    if (!count_zeros(input, header, model.threads, all)) return false;
    for (const Zeros& zeros : all) {
        const double threshold = threshold_of(from, zeros);
        if (threshold > 0 && zeros.share >= threshold) model.names.push_back(zeros.name);
    }
    if (model.names.empty()) model.reason = "no matrix of the file has enough zeros for the sparse kernels";
    return true;
}

bool open_model(const char* gguf, const racdeploy_options& options, racdeploy_model& model) {
    Input input;
    Header header;
    if (!input.open(gguf) || !read_header(input, 2, header)) return false;
    if (is_container(header))
        return fail(RACDEPLOY_DAMAGED, "%.300s is a .racgguf container: unpack it first", gguf);

    model.gguf = gguf;
    model.threads = threads_of(options.threads);
    model.in_small_pages = options.keep_in_small_pages != 0;
    model.reason = why_no_engine();
    if (!model.reason.empty()) return true;

    const racdeploy_thresholds from = options.thresholds ? *options.thresholds : known_thresholds();
    if (!may_be_faster(from)) {
        model.reason = options.thresholds ? "the thresholds leave no number format to the sparse kernels"
                                          : std::string("nobody has measured the ") + instruction_set() +
                                                " kernels: call racdeploy_measure, or pass thresholds";
        return true;
    }

    if (options.kept_folder && *options.kept_folder) {
        model.kept = kept_path(options.kept_folder, model.gguf);
        model.key = file_state(model.gguf) + form_of_matrices() + "|" + describe(from);
    }
    return choose(input, header, from, model);
}

}  // namespace

extern "C" racdeploy_status racdeploy_open(const char* gguf, const racdeploy_options* options,
                                           racdeploy_model** model) {
    return guarded([&] {
        if (!model) return fail(RACDEPLOY_USAGE, "there is no place for the model");
        *model = nullptr;
        auto opened = std::make_unique<racdeploy_model>();
        if (!open_model(gguf, options ? *options : racdeploy_options{}, *opened)) return false;
        *model = opened.release();
        return true;
    });
}

extern "C" const char* racdeploy_why_not(const racdeploy_model* model) {
    return model ? model->reason.c_str() : "the model is not opened";
}

extern "C" int64_t racdeploy_weights(const racdeploy_model* model) {
    return model ? static_cast<int64_t>(model->names.size()) : 0;
}

extern "C" const char* racdeploy_weight_name(const racdeploy_model* model, int64_t index) {
    if (index < 0 || index >= racdeploy_weights(model)) return nullptr;
    return model->names[static_cast<size_t>(index)].c_str();
}

extern "C" racdeploy_status racdeploy_enable(racdeploy_model* model) {
    return guarded([&] {
        if (!model) return fail(RACDEPLOY_USAGE, "the model is not opened");
        if (!model->reason.empty()) return true;
        if (!enable_next(model->names, model->threads)) {
            model->reason = racdeploy_last_error();
            return false;
        }
        if (model->kept.empty()) return true;

        KeptWeights found;
        if (found.find(model->kept, model->key)) {
            found.use();
            return true;
        }
        // Where there is no place for it, the load packs in memory.
        KeptWeights written;
        if (KeptWeights::write(model->gguf, model->names, model->kept, model->key, model->in_small_pages) &&
            written.find(model->kept, model->key))
            written.use();
        return true;
    });
}

extern "C" int64_t racdeploy_packed(void) { return packed_by_kernels(); }

extern "C" void racdeploy_close(racdeploy_model* model) { delete model; }

extern "C" racdeploy_status racdeploy_forget(const char* gguf, const char* kept_folder) {
    return guarded([&] {
        if (!gguf || !*gguf || !kept_folder || !*kept_folder) return fail(RACDEPLOY_USAGE, "a path is missing");
        return forget_kept(kept_path(kept_folder, gguf));
    });
}

extern "C" const char* racdeploy_instruction_set(void) { return instruction_set(); }

extern "C" racdeploy_status racdeploy_measure(int threads, racdeploy_thresholds* thresholds) {
    return guarded([&] {
        if (!thresholds) return fail(RACDEPLOY_USAGE, "there is no place for the thresholds");
        *thresholds = {2, 2, 2, 2, 2, 2, 2, 2};
        return measure(threads_of(threads), *thresholds);
    });
}
