// What a model needs of the plug-in for llama.cpp: engine.cpp has it where ggml is, no_engine.cpp where it is not.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "gguf_header.h"
#include "input.h"
#include "racdeploy.h"

namespace racdeploy::c {

struct Zeros {
    std::string name;
    uint32_t type;
    bool two_of_four;
    double share;
};

std::string why_no_engine();          // empty where this llama.cpp takes the kernels
const char* instruction_set();        // "" where there are none
std::string form_of_matrices();       // what decides how they are packed: a file of another form is not used
racdeploy_thresholds known_thresholds();  // measured in this process, else built in

// Count the zeros of all matrices that can be packed; false after fail().
bool count_zeros(const Input& input, const Header& header, int threads, std::vector<Zeros>& found);

// Name the weights of the next load; false after fail().
bool enable_next(const std::vector<std::string>& names, int threads);
int64_t packed_by_kernels();

bool measure(int threads, racdeploy_thresholds& thresholds);  // false after fail()

}  // namespace racdeploy::c
