// The weights of a model in ggml's hands, packed: a buffer that packs what is written into it and gives it back as it
// was, and the products that its weights take part in. How ggml comes to them is another file's: see ggml_plugin.h.
//
// llama.cpp asks for each weight which buffer type takes it; ours takes those that Python has named for the next model.
// Nothing throws across ggml's C interface.
#include "ggml_plugin.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

namespace racdeploy {
namespace {

constexpr int64_t alignment = 64, serial_bytes = 1 << 18;
constexpr int most_threads = 64;

std::mutex wanted_mutex;
std::set<std::string, std::less<>> wanted;  // names of the next model's weights
std::atomic<int64_t> packed_tensors{0};
int pack_threads = 1;

struct Unmap {
    int64_t bytes = 0;
    void operator()(void* memory) const { munmap(memory, bytes); }
};
using Mapped = std::unique_ptr<void, Unmap>;

// New memory, of PROT_NONE just addresses; null if there is none.
Mapped map_memory(int64_t bytes, int protection) {
    void* made = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return {made == MAP_FAILED ? nullptr : made, {bytes}};
}

// One weight: its matrix, in its own memory. Without offsets nothing was written yet: all zeros.
struct Weight {
    SparseMatrix matrix{};
    Mapped memory{};

    bool written() const { return matrix.offsets; }
};

struct Buffer {
    Mapped addresses;  // reserved, never touched: ggml wants every tensor to have one
    std::list<Weight> weights{};
};

Weight* weight_of(const ggml_tensor* tensor) { return static_cast<Weight*>(tensor->extra); }

[[noreturn]] void give_up(const char* what) {  // as ggml does where memory ends: there is no way to say no
    std::fprintf(stderr, "racdeploy: out of memory: %s\n", what);
    std::abort();
}

// Share rows among threads. Where the system gives no thread, this one does its part.
template <typename Work>
void over_rows(int64_t rows, int64_t bytes, const Work& work) {
    const int threads = bytes < serial_bytes ? 1 : static_cast<int>(std::min<int64_t>(pack_threads, rows));
    const int64_t share = (rows + threads - 1) / threads;

    std::thread others[most_threads];
    for (int t = 1; t < threads; t++) {
        const int64_t begin = std::min(rows, t * share), end = std::min(rows, begin + share);
        try {
            others[t] = std::thread([&work, begin, end] { work(begin, end); });
        } catch (const std::system_error&) {
            work(begin, end);
        }
    }

    work(0, std::min(rows, share));
    for (auto& thread : others)
        if (thread.joinable()) thread.join();
}

// Pack a tensor's blocks: offsets, heads and values, one behind the other, each padded to a line of the cache.
void write(Weight& weight, const ggml_tensor* tensor, const void* data) {
    const auto quant = static_cast<Quant>(tensor->type);
    const int64_t rows = tensor->ne[1], columns = tensor->ne[0], data_bytes = rows * row_bytes(quant, columns);
    const Blocks blocks{quant, kernels().preferred_pattern(quant, rows, columns, data), columns, data};

    const Memory<int64_t> offsets(static_cast<int64_t*>(std::malloc((rows + 1) * sizeof(int64_t))));
    if (!offsets) give_up(tensor->name);
    offsets[0] = 0;
    over_rows(rows, data_bytes,
              [&](int64_t begin, int64_t end) { kernels().count(blocks, &offsets[1], {begin, end}); });
    for (int64_t r = 0; r < rows; r++) offsets[r + 1] += offsets[r];

    const int64_t offsets_bytes = (rows + 1) * static_cast<int64_t>(sizeof(int64_t));
    const int64_t heads_at = round_up(offsets_bytes, alignment);
    const int64_t values_at = heads_at + round_up(rows * heads_bytes(quant, columns), alignment);
    const int64_t bytes = values_at + offsets[rows] + slack_bytes;
    Mapped memory = map_memory(bytes, PROT_READ | PROT_WRITE);
    if (!memory) give_up(tensor->name);
    // A token walks through all of it: with pages of 4 KB up to a fifth of the time goes to finding them.
    madvise(memory.get(), bytes, MADV_HUGEPAGE);

    auto* first = static_cast<uint8_t*>(memory.get());
    std::memcpy(first, offsets.get(), offsets_bytes);
    over_rows(rows, data_bytes, [&](int64_t begin, int64_t end) {
        kernels().pack(blocks, offsets.get(), first + heads_at, first + values_at, {begin, end});
    });

    if (!weight.written()) packed_tensors++;
    const auto* kept_offsets = reinterpret_cast<const int64_t*>(first);
    weight = {{quant, blocks.pattern, rows, columns, first + heads_at, first + values_at, kept_offsets},
              std::move(memory)};
}

// ggml's blocks of rows [begin, end), to change or to read.
Memory<uint8_t> blocks_of(const ggml_tensor* tensor, int64_t begin, int64_t end) {
    const size_t row = ggml_row_size(tensor->type, tensor->ne[0]);
    Memory<uint8_t> blocks(static_cast<uint8_t*>(std::calloc(end - begin, row)));
    if (!blocks) give_up(tensor->name);

    const Weight& weight = *weight_of(tensor);
    if (weight.written())  // unpack addresses rows from the first one
        for (int64_t r = begin; r < end; r++)
            kernels().unpack(weight.matrix.row(r), &blocks[(r - begin) * row], {0, 1});
    return blocks;
}

Buffer& buffer_of(ggml_backend_buffer_t buffer) { return *static_cast<Buffer*>(buffer->context); }
void free_buffer(ggml_backend_buffer_t buffer) { delete &buffer_of(buffer); }
void* get_base(ggml_backend_buffer_t buffer) { return buffer_of(buffer).addresses.get(); }

ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor) {
    if (tensor->view_src) return GGML_STATUS_SUCCESS;  // reads what it views through it
    try {
        tensor->extra = &buffer_of(buffer).weights.emplace_back();
    } catch (const std::bad_alloc&) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    return GGML_STATUS_SUCCESS;
}

// A part is written over the whole, which is then packed again.
template <typename Change>
void change(ggml_tensor* tensor, const Change& change_blocks) {
    const Memory<uint8_t> blocks = blocks_of(tensor, 0, tensor->ne[1]);
    change_blocks(blocks.get());
    write(*weight_of(tensor), tensor, blocks.get());
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor* tensor, const void* data, size_t offset, size_t size) {
    if (offset == 0 && size == ggml_nbytes(tensor)) {
        write(*weight_of(tensor), tensor, data);
    } else {
        change(tensor, [&](uint8_t* blocks) { std::memcpy(blocks + offset, data, size); });
    }
}

void memset_tensor(ggml_backend_buffer_t, ggml_tensor* tensor, uint8_t value, size_t offset, size_t size) {
    change(tensor, [&](uint8_t* blocks) { std::memset(blocks + offset, value, size); });
}

void get_tensor(ggml_backend_buffer_t, const ggml_tensor* tensor, void* data, size_t offset, size_t size) {
    if (!size) return;
    const size_t row = ggml_row_size(tensor->type, tensor->ne[0]), first = offset / row;
    const Memory<uint8_t> blocks = blocks_of(tensor, first, (offset + size + row - 1) / row);
    std::memcpy(data, &blocks[offset - first * row], size);
}

void clear(ggml_backend_buffer_t buffer, uint8_t) {  // ggml clears with 0 only
    for (Weight& weight : buffer_of(buffer).weights) weight = {};
}

const char* type_name(ggml_backend_buffer_type_t) { return "CPU_SPARSE"; }
size_t type_alignment(ggml_backend_buffer_type_t) { return alignment; }

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    Mapped addresses = map_memory(std::max<size_t>(size, 4096), PROT_NONE);
    auto* ours = addresses ? new (std::nothrow) Buffer{std::move(addresses)} : nullptr;
    if (!ours) return nullptr;

    if (size) {  // a model's weights; an empty buffer only asks what would go here
        std::lock_guard<std::mutex> lock(wanted_mutex);
        wanted.clear();
    }

    const ggml_backend_buffer_i functions{free_buffer, get_base, init_tensor, memset_tensor, set_tensor, get_tensor,
                                          nullptr,     nullptr,  nullptr,     clear,         nullptr};
    return ggml_backend_buffer_init(type, functions, ours, size);
}

bool is_wanted(const ggml_tensor* weight) {
    std::lock_guard<std::mutex> lock(wanted_mutex);
    return wanted.find(weight->name) != wanted.end();
}

bool is_packable(const ggml_tensor* weight) {
    const bool known = weight->type == GGML_TYPE_Q8_0 || weight->type == GGML_TYPE_Q4_0 ||
                       weight->type == GGML_TYPE_F16 || weight->type == GGML_TYPE_BF16;
    return known && weight->ne[0] % block_weights == 0 && ggml_n_dims(weight) <= 2 && ggml_is_contiguous(weight) &&
           !weight->view_src;
}

const float* activation_of(const ggml_tensor* activation, int64_t row) {
    const int64_t n1 = activation->ne[1], n2 = activation->ne[2];
    const char* data = static_cast<const char*>(activation->data);
    return reinterpret_cast<const float*>(data + row % n1 * activation->nb[1] + row / n1 % n2 * activation->nb[2] +
                                          row / n1 / n2 * activation->nb[3]);
}

}  // namespace

ggml_backend_buffer_type_i buffer_type_functions() {
    return {type_name, alloc_buffer, type_alignment, nullptr, nullptr, nullptr};
}

bool is_ours(const ggml_tensor* weight) { return weight->buffer && weight->buffer->buft == sparse_buffer_type(); }

bool takes(const ggml_tensor* op) {
    const ggml_tensor *weight = op->src[0], *activation = op->src[1];
    if (op->op != GGML_OP_MUL_MAT || !is_ours(weight) || !is_packable(weight)) return false;
    if (!weight->extra && !is_wanted(weight)) return false;
    if (activation->buffer && !ggml_backend_buft_is_host(activation->buffer->buft)) return false;
    return activation->type == GGML_TYPE_F32 && activation->nb[0] == sizeof(float) && op->type == GGML_TYPE_F32;
}

Product::Product(const ggml_tensor* op) : op_(op), tokens_(ggml_nrows(op->src[1])), rows_(op->src[0]->ne[1]) {
    const auto quant = static_cast<Quant>(op->src[0]->type);
    bytes_ = round_up(workspace_bytes(quant, op->src[0]->ne[0], tokens_), alignment);
}

size_t Product::bytes(int threads) const { return bytes_ * (is_one_token() ? threads : 1) + alignment; }

uint8_t* Product::activations(void* memory, int thread) const {
    auto* first = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<int64_t>(memory), alignment));
    return first + (is_one_token() ? bytes_ * thread : 0);
}

bool Product::is_zero(int thread) const {
    if (weight_of(op_->src[0])->written()) return false;
    if (thread == 0) std::memset(op_->data, 0, ggml_nbytes(op_));
    return true;
}

void Product::prepare(void* memory, int thread, int threads) const {
    const SparseMatrix& matrix = weight_of(op_->src[0])->matrix;
    uint8_t* prepared = activations(memory, thread);
    const int64_t step = is_one_token() ? 1 : threads;
    for (int64_t token = is_one_token() ? 0 : thread; token < tokens_; token += step)
        kernels().prepare(matrix.quant, matrix.columns, tokens_, token, activation_of(op_->src[1], token), prepared);
}

void Product::multiply(void* memory, int thread, Rows rows) const {
    const SparseMatrix& matrix = weight_of(op_->src[0])->matrix;
    rows.end = std::min(rows_, rows.end);
    if (rows.begin >= rows.end) return;
    kernels().multiply(matrix, tokens_, activations(memory, thread), {static_cast<float*>(op_->data), rows_}, rows);
}

Rows Product::share(int thread, int threads) const {
    const int64_t rows = round_up(rows_, 16 * threads) / threads;
    return {rows * thread, rows * (thread + 1)};
}

Rows Product::chunk(int64_t number, int threads) const {
    const int64_t rows = std::max<int64_t>(16, rows_ / (8 * threads) / 16 * 16);
    return {rows * number, rows * (number + 1)};
}

}  // namespace racdeploy

// Name the weights of the next model that is loaded; false where memory ended.
EXPORT bool rac_ggml_enable(const char* const* names, int64_t count, int threads) {
    using namespace racdeploy;
    std::lock_guard<std::mutex> lock(wanted_mutex);
    try {
        wanted = {names, names + count};
    } catch (const std::bad_alloc&) {
        wanted.clear();
        return false;
    }
    pack_threads = std::clamp(threads, 1, most_threads);
    packed_tensors = 0;
    return true;
}

// Tensors packed since the last rac_ggml_enable.
EXPORT int64_t rac_ggml_packed() { return racdeploy::packed_tensors; }

// Bytes of the values that would be stored of a matrix, -1 where memory ended; and the pattern that it would have.
EXPORT int64_t rac_ggml_stored_bytes(int quant, int64_t rows, int64_t columns, const void* blocks, int* pattern) {
    using namespace racdeploy;
    *pattern = static_cast<int>(kernels().preferred_pattern(Quant(quant), rows, columns, blocks));
    const Memory<int64_t> counts(static_cast<int64_t*>(std::malloc(rows * sizeof(int64_t))));
    if (!counts) return -1;
    kernels().count({Quant(quant), Pattern::unstructured, columns, blocks}, counts.get(), {0, rows});
    return std::accumulate(&counts[0], &counts[rows], int64_t{0});
}
