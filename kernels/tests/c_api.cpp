// The kernels as one C function, for the tests: what it does is named, numbers and arrays come in the order of each
// case below. One function serves ctypes and the program that runs on another processor (kernel_driver.cpp).
#include <cstring>

#include "sparse_matrix.h"

using namespace racdeploy;

namespace {

struct Arguments {
    const int64_t* numbers;
    void* const* arrays;

    Quant quant() const { return static_cast<Quant>(numbers[0]); }
    Pattern pattern() const { return static_cast<Pattern>(numbers[1]); }
    template <typename Element>
    Element* array(int index) const {
        return static_cast<Element*>(arrays[index]);
    }
    Blocks blocks() const { return {quant(), pattern(), numbers[2], arrays[0]}; }
    SparseMatrix matrix() const {
        return {quant(), pattern(), numbers[2], numbers[3], array<uint8_t>(0), array<uint8_t>(1), array<int64_t>(2)};
    }
    Rows rows(int index) const { return {numbers[index], numbers[index + 1]}; }
};

struct Function {
    const char* name;
    int64_t (*call)(const Arguments&);
};

const Function functions[] = {
    {"row_bytes", [](const Arguments& a) { return row_bytes(a.quant(), a.numbers[1]); }},
    {"heads_bytes", [](const Arguments& a) { return a.numbers[1] * heads_bytes(a.quant(), a.numbers[2]); }},
    {"workspace_bytes", [](const Arguments& a) { return workspace_bytes(a.quant(), a.numbers[1], a.numbers[2]); }},
    {"use", [](const Arguments& a) { return int64_t{use_instruction_set(a.array<char>(0))}; }},
    {"preferred_pattern",
     [](const Arguments& a) {
         return static_cast<int64_t>(
             kernels().preferred_pattern(a.quant(), a.numbers[1], a.numbers[2], a.array<void>(0)));
     }},
    {"count",
     [](const Arguments& a) {
         kernels().count(a.blocks(), a.array<int64_t>(1), a.rows(3));
         return int64_t{0};
     }},
    {"pack",
     [](const Arguments& a) {
         kernels().pack(a.blocks(), a.array<int64_t>(1), a.array<uint8_t>(2), a.array<uint8_t>(3), a.rows(3));
         return int64_t{0};
     }},
    {"unpack",
     [](const Arguments& a) {
         kernels().unpack(a.matrix(), a.array<void>(3), a.rows(4));
         return int64_t{0};
     }},
    {"valid", [](const Arguments& a) { return int64_t{valid(a.matrix(), a.numbers[4])}; }},
    {"prepare",
     [](const Arguments& a) {
         kernels().prepare(a.quant(), a.numbers[1], a.numbers[2], a.numbers[3], a.array<float>(0), a.array<void>(1));
         return int64_t{0};
     }},
    {"multiply",
     [](const Arguments& a) {
         kernels().multiply(a.matrix(), a.numbers[4], a.array<void>(3), {a.array<float>(4), a.numbers[5]}, a.rows(6));
         return int64_t{0};
     }},
};

}  // namespace

EXPORT int64_t rac_test_call(const char* name, const int64_t* numbers, void* const* arrays) {
    for (const Function& function : functions)
        if (!std::strcmp(function.name, name)) return function.call({numbers, arrays});
    return -1;
}
EXPORT int rac_use_instruction_set(const char* name) { return use_instruction_set(name); }
