// The kernels inside ggml against ggml's own: the same answers, and how fast. Both sides run the same graph; the
// buffer of the weights and the backend differ.
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "ggml-cpp.h"
#include "ggml_plugin.h"

namespace racdeploy {
namespace {

constexpr int least_runs = 5;
constexpr double busy_share = 0.8;
constexpr double enough_ms = 50, most_ms = 3000;  // of runs that count, and of all of both sides
constexpr int64_t drawn_rows = 128;  // to draw all rows of a large matrix takes longer than to measure it

double now_ms(clockid_t clock) {
    timespec time;
    clock_gettime(clock, &time);
    return 1e3 * static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_nsec);
}

struct Case {
    ggml_type type;
    int64_t rows, columns, tokens;
    std::vector<uint8_t> blocks;
    std::vector<float> activations;
};

// A random product: 2 zeros of every 4 weights, or a share of all of them.
Case draw(int quant, int64_t rows, int64_t columns, int64_t tokens, double zeros, bool two_of_four,
          std::mt19937_64& random) {
    std::vector<float> weights(rows * columns);
    std::normal_distribution<float> normal(0, 0.05f);
    std::uniform_real_distribution<double> uniform(0, 1);
    for (float& weight : weights) weight = uniform(random) < zeros && !two_of_four ? 0 : normal(random);

    if (two_of_four)
        for (int64_t i = 0; i < rows * columns; i += 4) {
            const int first = static_cast<int>(random() % 4), second = (first + 1 + static_cast<int>(random() % 3)) % 4;
            weights[i + first] = weights[i + second] = 0;
        }

    const auto type = static_cast<ggml_type>(quant);
    std::vector<uint8_t> blocks(rows * ggml_row_size(type, columns));
    ggml_quantize_chunk(type, weights.data(), blocks.data(), 0, rows, columns, nullptr);

    std::vector<float> activations(columns * tokens);
    std::normal_distribution<float> standard(0, 1);
    for (float& value : activations) value = standard(random);
    return {type, rows, columns, tokens, std::move(blocks), std::move(activations)};
}

// The same rows over and over.
Case repeat(Case drawn, int64_t times) {
    const size_t bytes = drawn.blocks.size();
    drawn.blocks.resize(bytes * times);
    for (int64_t i = 1; i < times; i++)
        std::copy_n(drawn.blocks.begin(), bytes, drawn.blocks.begin() + static_cast<std::ptrdiff_t>(i * bytes));
    drawn.rows *= times;
    return drawn;
}

// Several equal products in one graph, with weights in a buffer of one type.
class Products {
public:
    Products(ggml_backend_buffer_type_t buffer_type, const Case& given, int count, int threads)
        : weights_(ggml_init({ggml_tensor_overhead() * count, nullptr, true})),
          outputs_context_(ggml_init({ggml_tensor_overhead() * (count + 1), nullptr, true})),
          backend_(buffer_type == sparse_buffer_type() ? new_backend() : ggml_backend_cpu_init()) {
        for (int i = 0; i < count; i++) ggml_new_tensor_2d(weights_.get(), given.type, given.columns, given.rows);
        weights_buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(weights_.get(), buffer_type));

        ggml_context* context = outputs_context_.get();
        ggml_tensor* activation = ggml_new_tensor_2d(context, GGML_TYPE_F32, given.columns, given.tokens);
        for (ggml_tensor* w = first(); w; w = ggml_get_next_tensor(weights_.get(), w)) {
            ggml_backend_tensor_set(w, given.blocks.data(), 0, given.blocks.size());
            outputs_.push_back(ggml_mul_mat(context, w, activation));
        }

        buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(context, ggml_backend_cpu_buffer_type()));
        ggml_backend_tensor_set(activation, given.activations.data(), 0, given.activations.size() * sizeof(float));
        use_threads(threads);
    }

    ggml_tensor* first() const { return ggml_get_first_tensor(weights_.get()); }

    // A graph has a product for each thread, so that a thread works as long on two threads as on sixty.
    void use_threads(int threads) {
        set_threads(backend_.get(), threads);
        const size_t together = std::min<size_t>(threads, outputs_.size()), nodes = 2 * together + 8;
        graphs_.clear();
        graphs_context_.reset(
            ggml_init({ggml_graph_overhead_custom(nodes, false) * (outputs_.size() / together), nullptr, true}));

        for (size_t i = 0; i + together <= outputs_.size(); i += together) {
            graphs_.push_back(ggml_new_graph_custom(graphs_context_.get(), nodes, false));
            for (size_t k = 0; k < together; k++) ggml_build_forward_expand(graphs_.back(), outputs_[i + k]);
        }
    }

    // The graphs take turns: when one comes again, the others' weights have taken its place in the cache.
    void run() { ggml_backend_graph_compute(backend_.get(), graphs_[turn_++ % graphs_.size()]); }

    std::vector<float> output() const {
        std::vector<float> values(ggml_nelements(outputs_[0]));
        ggml_backend_tensor_get(outputs_[0], values.data(), 0, values.size() * sizeof(float));
        return values;
    }

private:
    ggml_context_ptr weights_, outputs_context_, graphs_context_;
    ggml_backend_ptr backend_;
    ggml_backend_buffer_ptr weights_buffer_, buffer_;
    std::vector<ggml_cgraph*> graphs_;
    std::vector<ggml_tensor*> outputs_;
    size_t turn_ = 0;
};

// The fastest of some runs: whatever else the machine does only ever makes a run slower.
class Fastest {
public:
    explicit Fastest(int threads) : threads_(threads) {}

    void add(Products& products) {
        const double wall_ms = now_ms(CLOCK_MONOTONIC), own_ms = now_ms(CLOCK_THREAD_CPUTIME_ID),
                     all_ms = now_ms(CLOCK_PROCESS_CPUTIME_ID);
        products.run();
        const double own = now_ms(CLOCK_THREAD_CPUTIME_ID) - own_ms, all = now_ms(CLOCK_PROCESS_CPUTIME_ID) - all_ms,
                     wall = now_ms(CLOCK_MONOTONIC) - wall_ms;

        // The processor time of one thread has nothing of other programs in it. Several threads wait for each other,
        // so the wall counts, and only where all of them were running: who waits for another one does so busily.
        if (threads_ > 1 && all < busy_share * threads_ * wall) return;
        const double took = threads_ > 1 ? wall : own;
        ms_ = std::min(ms_, took);
        counted_ms_ += took;
        runs_++;
    }

    bool well_known() const { return runs_ >= least_runs && counted_ms_ >= enough_ms; }
    double ms() const { return runs_ >= least_runs ? ms_ : NAN; }

private:
    int threads_, runs_ = 0;
    double ms_ = INFINITY, counted_ms_ = 0;
};

// The product as a model has it: between other operations, in a graph that ggml's scheduler shares out among backends.
// Empty where the product runs on another backend than the weights' own.
std::vector<float> scheduled_output(const Case& given, int threads) {
    const ggml_context_ptr weights(ggml_init({ggml_tensor_overhead(), nullptr, true}));
    ggml_tensor* weight = ggml_new_tensor_2d(weights.get(), given.type, given.columns, given.rows);
    const ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), sparse_buffer_type()));
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_tensor_set(weight, given.blocks.data(), 0, given.blocks.size());

    const size_t nodes = GGML_DEFAULT_GRAPH_SIZE;
    const ggml_context_ptr context(
        ggml_init({8 * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false), nullptr, true}));
    ggml_tensor* activation = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, given.columns, given.tokens);
    ggml_set_input(activation);
    // Scaled by powers of two, and back: numbers stay what they are.
    ggml_tensor* product = ggml_mul_mat(context.get(), weight, ggml_scale(context.get(), activation, 4));
    ggml_tensor* output = ggml_scale(context.get(), product, 0.25f);
    ggml_set_output(output);
    ggml_cgraph* graph = ggml_new_graph_custom(context.get(), nodes, false);
    ggml_build_forward_expand(graph, output);

    const ggml_backend_ptr ours(new_backend()), cpu(ggml_backend_cpu_init());
    for (const auto* each : {&ours, &cpu}) set_threads(each->get(), threads);
    ggml_backend_t backends[] = {ours.get(), cpu.get()};
    const ggml_backend_sched_ptr scheduler(ggml_backend_sched_new(backends, nullptr, 2, nodes, false, false));
    if (!ggml_backend_sched_alloc_graph(scheduler.get(), graph)) return {};
    if (ggml_backend_sched_get_tensor_backend(scheduler.get(), product) != ours.get()) return {};

    ggml_backend_tensor_set(activation, given.activations.data(), 0, given.activations.size() * sizeof(float));
    if (ggml_backend_sched_graph_compute(scheduler.get(), graph) != GGML_STATUS_SUCCESS) return {};
    std::vector<float> values(ggml_nelements(output));
    ggml_backend_tensor_get(output, values.data(), 0, values.size() * sizeof(float));
    return values;
}

// The largest difference of two outputs, as a share of the largest value; infinite where one is not a number.
double difference(const std::vector<float>& expected, const std::vector<float>& found) {
    if (found.size() != expected.size()) return INFINITY;
    double largest = 0, worst = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        if (!std::isfinite(found[i])) return INFINITY;
        largest = std::max(largest, std::abs(static_cast<double>(expected[i])));
        worst = std::max(worst, std::abs(static_cast<double>(expected[i]) - static_cast<double>(found[i])));
    }
    return largest > 0 ? worst / largest : worst;
}

// The product of the weights with inputs rounded to half precision, summed in float64. Where a processor adds half
// floats ggml does so too, as on AArch64: its products of F16 are then 1e-3 off, and say nothing about ours.
std::vector<float> exact_half_products(const Case& given) {
    std::vector<float> weights(given.rows * given.columns), inputs(given.activations.size()), outputs;
    ggml_fp16_to_fp32_row(reinterpret_cast<const ggml_fp16_t*>(given.blocks.data()), weights.data(),
                          given.rows * given.columns);
    for (size_t i = 0; i < inputs.size(); i++) inputs[i] = ggml_fp16_to_fp32(ggml_fp32_to_fp16(given.activations[i]));

    for (int64_t token = 0; token < given.tokens; token++)
        for (int64_t row = 0; row < given.rows; row++) {
            double sum = 0;
            for (int64_t i = 0; i < given.columns; i++)
                sum += double{weights[row * given.columns + i]} * inputs[token * given.columns + i];
            outputs.push_back(static_cast<float>(sum));
        }
    return outputs;
}

// Does the tensor give back what was written, as a whole, in part, and after a part was changed?
bool restores(ggml_tensor* weight, std::vector<uint8_t> blocks, std::mt19937_64& random) {
    std::vector<uint8_t> found(blocks.size());
    ggml_backend_tensor_get(weight, found.data(), 0, found.size());
    if (found != blocks) return false;

    const size_t begin = random() % blocks.size(), size = random() % (blocks.size() - begin) + 1;
    ggml_backend_tensor_get(weight, found.data(), begin, size);
    if (std::memcmp(found.data(), blocks.data() + begin, size)) return false;

    const size_t row = ggml_row_size(weight->type, weight->ne[0]), last = blocks.size() - row;
    std::copy_n(blocks.begin(), row, blocks.begin() + static_cast<std::ptrdiff_t>(last));
    ggml_backend_tensor_set(weight, blocks.data() + last, last, row);
    ggml_backend_tensor_get(weight, found.data(), 0, found.size());
    return found == blocks;
}

ggml_backend_buffer_type_t* extra_buffer_types() {  // of ggml's CPU backend; the list ends with nullptr
    ggml_backend_reg_t cpu = ggml_backend_cpu_reg();
    void* function = ggml_backend_reg_get_proc_address(cpu, "ggml_backend_dev_get_extra_bufts");
    if (!function) return nullptr;
    return reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(function)(ggml_backend_reg_dev_get(cpu, 0));
}

// The buffer type that stock llama.cpp would choose for such a weight.
ggml_backend_buffer_type_t stock_buffer_type(const Case& given) {
    ggml_context_ptr context(ggml_init({ggml_tensor_overhead() * 4, nullptr, true}));
    ggml_tensor* weight = ggml_new_tensor_2d(context.get(), given.type, given.columns, given.rows);
    ggml_tensor* activation = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, given.columns, 512);
    ggml_tensor* product = ggml_mul_mat(context.get(), weight, activation);

    ggml_backend_dev_t cpu = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
    for (auto* type = extra_buffer_types(); type && *type; type++) {
        ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(*type, 0));
        weight->buffer = buffer.get();
        if (ggml_backend_dev_supports_op(cpu, product)) return *type;
    }
    return ggml_backend_cpu_buffer_type();
}

void race(Products& stock, Products& sparse, int threads, double* stock_ms, double* sparse_ms) {
    stock.use_threads(threads);
    sparse.use_threads(threads);

    Fastest of_stock(threads), of_sparse(threads);
    const double end_ms = now_ms(CLOCK_MONOTONIC) + most_ms;
    for (int i = 0; i < least_runs || now_ms(CLOCK_MONOTONIC) < end_ms; i++) {
        if (of_stock.well_known() && of_sparse.well_known()) break;
        of_stock.add(stock);
        of_sparse.add(sparse);
    }
    *stock_ms = of_stock.ms();
    *sparse_ms = of_sparse.ms();
}

}  // namespace
}  // namespace racdeploy

// The largest difference from ggml's own product, as a share of the largest output, of F16 from the exact one if that
// is less; -1 where a weight is not given back as it was written.
EXPORT double rac_ggml_difference(int quant, int64_t rows, int64_t columns, int64_t tokens, double zeros,
                                  bool two_of_four, int threads, uint64_t seed) {
    using namespace racdeploy;
    std::mt19937_64 random(seed);
    const Case drawn = draw(quant, rows, columns, tokens, zeros, two_of_four, random);
    Products stock(ggml_backend_cpu_buffer_type(), drawn, 1, threads);
    Products sparse(sparse_buffer_type(), drawn, 1, threads);
    stock.run();
    sparse.run();
    const std::vector<float> expected = stock.output();
    const std::vector<float> exact = drawn.type == GGML_TYPE_F16 ? exact_half_products(drawn) : expected;
    double found = 0;
    for (const auto& outputs : {sparse.output(), scheduled_output(drawn, threads)})
        found = std::max(found, std::min(difference(expected, outputs), difference(exact, outputs)));
    return restores(sparse.first(), drawn.blocks, random) ? found : -1;
}

// Milliseconds of ggml's own products and of the sparse ones over `count` equal matrices, of which each thread has one
// at a time, on each of some numbers of threads; not numbers where other programs kept the cores busy.
EXPORT void rac_ggml_time(int quant, int64_t rows, int64_t columns, int64_t tokens, double zeros, bool two_of_four,
                          int count, const int* threads, int thread_counts, double* stock_ms, double* sparse_ms) {
    using namespace racdeploy;
    std::mt19937_64 random(1);
    const int64_t times = rows % drawn_rows ? 1 : rows / drawn_rows;
    const Case drawn = repeat(draw(quant, rows / times, columns, tokens, zeros, two_of_four, random), times);
    Products stock(stock_buffer_type(drawn), drawn, count, 1);
    Products sparse(sparse_buffer_type(), drawn, count, 1);
    for (int i = 0; i < thread_counts; i++) race(stock, sparse, threads[i], &stock_ms[i], &sparse_ms[i]);
}
