// Drives the plug-in with every read and write checked: packing, partial writes, reading back, products, kept files.
// Prints the largest difference from ggml's own products; the exit code says which check failed.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "file_maps.h"
#include "ggml_plugin.h"

using namespace racdeploy;

extern "C" bool rac_ggml_enable(const char* const*, int64_t, int);
extern "C" bool rac_ggml_keep(int, int64_t, const char* const*, const Place*, int64_t);
extern "C" int64_t rac_ggml_pack(int, int64_t, int64_t, const void*, void*, int64_t, int*);
extern "C" bool rac_ggml_maps_huge(int, int64_t);
extern "C" double rac_ggml_difference(int, int64_t, int64_t, int64_t, double, bool, int, uint64_t);

namespace {

void require(bool held, int code) {
    if (!held) std::exit(code);
}

double products() {
    double worst = 0;
    uint64_t seed = 0;
    for (int quant : {8, 2, 1, 30})
        for (int64_t rows : {1, 17, 200})
            for (int64_t columns : {32, 256, 1184})
                for (int64_t tokens : {1, 3, 20}) {
                    const bool pattern = columns == 256;
                    const double found = rac_ggml_difference(quant, rows, columns, tokens, 0.5, pattern, 2, ++seed);
                    require(found >= 0, 3);
                    if (rows * tokens > 100 && found > worst) worst = found;
                }
    for (int quant : {11, 14})
        for (bool two_of_four : {true, false})
            for (int64_t tokens : {1, 3, 20}) {
                const double found = rac_ggml_difference(quant, 40, 512, tokens, 0.5, two_of_four, 2, ++seed);
                require(found >= 0, 3);
                if (found > worst) worst = found;
            }
    return worst;
}

// A file with one packed matrix, as near to its end as may be; it is deleted when it is closed.
struct File {
    FILE* stream = std::tmpfile();
    Place place;
    int64_t bytes;

    File(int quant, int64_t rows, int64_t columns, const std::vector<uint8_t>& blocks, bool spoil_masks) {
        std::vector<uint8_t> memory(rows * (8 + 3 * (columns + 256)) + 4096);
        int pattern = 0;
        const auto pack_into = [&](int64_t room) {
            return rac_ggml_pack(quant, rows, columns, blocks.data(), memory.data(), room, &pattern);
        };
        const int64_t size = pack_into(static_cast<int64_t>(memory.size()));
        require(size > 0 && pack_into(size - 1) < 0 && pack_into(size) == size, 4);
        const int64_t behind = 2 * groups(columns) * group_weights + slack_bytes, page = sysconf(_SC_PAGESIZE);
        const int64_t begin = (page - (size + behind) % page) / 64 * 64;
        const Parts parts(Quant(quant), rows, columns);
        const int64_t masks_end = is_k_quant(Quant(quant)) ? size - slack_bytes : parts.values;  // with their values
        if (spoil_masks) std::memset(memory.data() + parts.heads, 255, masks_end - parts.heads);
        place = {quant, pattern, rows, columns, begin, size};
        bytes = begin + size + behind;
        std::fseek(stream, begin, SEEK_SET);
        std::fwrite(memory.data(), 1, size, stream);
        std::fflush(stream);
        require(ftruncate(fileno(stream), bytes) == 0, 5);
    }
    ~File() { std::fclose(stream); }

    std::shared_ptr<KeptFile> map(const Place& as) const {
        auto file = KeptFile::map(fileno(stream), bytes);
        require(file && file->add("weight", as), 6);
        return file;
    }
    bool finds(const Place& as) const {
        SparseMatrix matrix;
        return map(as)->find("weight", Quant(place.quant), place.rows, place.columns, matrix);
    }
    void write_offset(int64_t row, int64_t value) const {
        std::fseek(stream, place.begin + 8 * row, SEEK_SET);
        std::fwrite(&value, 8, 1, stream);
        std::fflush(stream);
    }
};

// What a table must not say, and offsets that leave the matrix.
void refusals(const File& file) {
    require(file.finds(file.place), 10);
    require(!rac_ggml_maps_huge(fileno(file.stream), file.bytes), 9);  // smaller than a huge page
    for (int64_t Place::* number :
         {&Place::quant, &Place::pattern, &Place::rows, &Place::columns, &Place::begin, &Place::bytes})
        for (int64_t wrong : {int64_t{-64}, int64_t{7}, file.bytes / 64 * 64, INT64_MAX, INT64_MIN}) {
            Place place = file.place;
            place.*number = wrong;
            require(!file.finds(place), 11);
        }
    Place short_one = file.place;
    short_one.bytes -= 1;
    require(!file.finds(short_one), 12);
    Place late = file.place;
    late.begin += 64;
    require(!file.finds(late), 13);
    SparseMatrix matrix;
    const auto mapped = file.map(file.place);
    require(!mapped->find("other", Quant(file.place.quant), file.place.rows, file.place.columns, matrix), 14);
    for (int64_t value : {int64_t{-1}, int64_t{1} << 40}) {
        file.write_offset(kept_offsets(Quant(file.place.quant), file.place.rows) / 2, value);
        require(!file.finds(file.place), 15);
    }
}

// Spoiled masks count more values than there are: products are wrong, and nothing is read outside of the file.
void spoiled_masks(int quant, int64_t rows, int64_t columns, const std::vector<uint8_t>& blocks) {
    const File file(quant, rows, columns, blocks, true);
    const auto mapped = file.map(file.place);
    SparseMatrix matrix;
    require(mapped->find("weight", Quant(quant), rows, columns, matrix), 20);
    std::vector<float> input(columns * 3, 1.0f), output(rows * 3);
    std::vector<uint8_t> restored(blocks.size());
    for (const char* name : {"portable", "avx2", "avx_vnni", "avx512"}) {
        if (!use_instruction_set(name)) continue;
        for (int64_t tokens : {1, 3}) {
            void* workspace = std::aligned_alloc(64, (workspace_bytes(matrix.quant, columns, tokens) + 63) / 64 * 64);
            for (int64_t t = 0; t < tokens; t++)
                kernels().prepare(matrix.quant, columns, tokens, t, input.data() + t * columns, workspace);
            kernels().multiply(matrix, tokens, workspace, {output.data(), rows}, {0, rows});
            std::free(workspace);
        }
        kernels().unpack(matrix, restored.data(), {0, rows});
    }
    use_instruction_set("");
}

// A model of one weight.
struct Loaded {
    ggml_context* context = ggml_init({ggml_tensor_overhead(), nullptr, true});
    ggml_tensor* weight;
    ggml_backend_buffer_t buffer;

    Loaded(ggml_type type, int64_t rows, int64_t columns, const char* name, const std::vector<uint8_t>& given)
        : weight(ggml_new_tensor_2d(context, type, columns, rows)) {
        ggml_set_name(weight, name);
        buffer = ggml_backend_alloc_ctx_tensors_from_buft(context, sparse_buffer_type());
        ggml_backend_tensor_set(weight, given.data(), 0, given.size());
    }
    ~Loaded() {
        ggml_backend_buffer_free(buffer);
        ggml_free(context);
    }
    std::vector<uint8_t> blocks() const {
        std::vector<uint8_t> found(ggml_nbytes(weight));
        ggml_backend_tensor_get(weight, found.data(), 0, found.size());
        return found;
    }
};

// A weight that is loaded with a kept file is the file's, whatever else it is given; what is written later is not.
void kept_weight(int quant, int64_t rows, int64_t columns, std::vector<uint8_t> blocks) {
    const auto type = static_cast<ggml_type>(quant);
    const char* name = "weight";
    {
        const File file(quant, rows, columns, blocks, false);
        require(rac_ggml_enable(&name, 1, 2), 29);
        require(rac_ggml_keep(fileno(file.stream), file.bytes, &name, &file.place, 1), 30);
    }  // closed and deleted: the map is what counts
    const size_t row = ggml_row_size(type, columns);
    std::vector<uint8_t> given = blocks;
    std::memset(given.data() + row, 1, row);  // none of the rows that are compared
    {
        const Loaded loaded(type, rows, columns, name, given);
        require(loaded.blocks() == blocks, 31);
        std::memcpy(blocks.data() + 2 * row, blocks.data(), row);
        ggml_backend_tensor_set(loaded.weight, blocks.data() + 2 * row, 2 * row, row);
        require(loaded.blocks() == blocks, 32);
        ggml_backend_tensor_set(loaded.weight, given.data(), 0, given.size());
        require(loaded.blocks() == given, 33);
    }
    require(Loaded(type, rows, columns, name, given).blocks() == given, 34);  // the next model has not asked for it
    given = blocks;
    std::memset(given.data() + (rows - 1) * row, 1, row);
    const File file(quant, rows, columns, blocks, false);
    require(rac_ggml_enable(&name, 1, 2) && rac_ggml_keep(fileno(file.stream), file.bytes, &name, &file.place, 1), 35);
    require(Loaded(type, rows, columns, name, given).blocks() == given, 36);  // another model's matrix
}

// The blocks of random weights, all of them or the first two of every four.
std::vector<uint8_t> draw_blocks(int quant, int64_t rows, int64_t columns, bool two_of_four, std::mt19937_64& random) {
    std::normal_distribution<float> normal(0, 1);
    std::vector<float> weights(rows * columns);
    for (size_t i = 0; i < weights.size(); i++) weights[i] = two_of_four && i % 4 > 1 ? 0 : normal(random);
    const auto type = static_cast<ggml_type>(quant);
    std::vector<uint8_t> blocks(rows * ggml_row_size(type, columns));
    ggml_quantize_chunk(type, weights.data(), blocks.data(), 0, rows, columns, nullptr);
    return blocks;
}

// One K-quant that is written as dense, as 2:4, and then with a dense row among those of 2:4.
void changed_pattern(int quant, std::mt19937_64& random) {
    const int64_t rows = 7, columns = 512;
    const auto type = static_cast<ggml_type>(quant);
    const size_t row = ggml_row_size(type, columns);
    const auto dense = draw_blocks(quant, rows, columns, false, random);
    auto blocks = draw_blocks(quant, rows, columns, true, random);
    std::vector<uint8_t> memory(2 * dense.size() + 4096);
    const auto has_pattern = [&](const std::vector<uint8_t>& given, Pattern expected) {
        int pattern = -1;
        const auto room = static_cast<int64_t>(memory.size());
        return rac_ggml_pack(quant, rows, columns, given.data(), memory.data(), room, &pattern) > 0 &&
               static_cast<Pattern>(pattern) == expected;
    };

    const Loaded loaded(type, rows, columns, "weight", dense);
    require(has_pattern(dense, Pattern::unstructured) && loaded.blocks() == dense, 40);
    ggml_backend_tensor_set(loaded.weight, blocks.data(), 0, blocks.size());
    require(has_pattern(blocks, Pattern::two_of_four) && loaded.blocks() == blocks, 41);
    std::memcpy(blocks.data() + 3 * row, dense.data() + 3 * row, row);
    ggml_backend_tensor_set(loaded.weight, blocks.data() + 3 * row, 3 * row, row);
    require(has_pattern(blocks, Pattern::unstructured) && loaded.blocks() == blocks, 42);
}

}  // namespace

int main() {
    require(rac_ggml_enable(nullptr, 0, 3), 2);
    const double worst = products();
    std::mt19937_64 random(0);
    std::normal_distribution<float> normal(0, 1);
    for (int quant : {8, 2, 1, 30, 11, 14})
        for (int64_t columns : {32, 256, 1184}) {
            const int64_t rows = 19;
            const auto type = static_cast<ggml_type>(quant);
            const bool two_of_four = is_k_quant(Quant(quant));
            if (two_of_four && columns != 256) continue;
            std::vector<float> weights(rows * columns);
            for (size_t i = 0; i < weights.size(); i++)
                weights[i] = (two_of_four ? i % 4 < 2 : random() % 2) ? normal(random) : 0;
            std::vector<uint8_t> blocks(rows * ggml_row_size(type, columns));
            ggml_quantize_chunk(type, weights.data(), blocks.data(), 0, rows, columns, nullptr);
            refusals(File(quant, rows, columns, blocks, false));
            spoiled_masks(quant, rows, columns, blocks);
            kept_weight(quant, rows, columns, blocks);
        }
    for (int quant : {11, 14}) changed_pattern(quant, random);
    std::printf("%g", worst);
}
