#include "kernels.h"

namespace racdeploy {

// No kernels of this instruction set yet.
const Kernels avx512_kernels = {"avx512", [] { return false; }, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace racdeploy
