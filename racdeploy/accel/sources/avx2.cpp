#include "kernels.h"

namespace racdeploy {

// No kernels of this instruction set yet.
const Kernels avx2_kernels = {"avx2", [] { return false; }, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace racdeploy
