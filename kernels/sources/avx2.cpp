// AVX2: what every x86 processor since 2013 (Intel) and 2015 (AMD) has.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__BMI2__) && defined(__POPCNT__)
#include "avx2_kernels.h"

namespace racdeploy {
const Kernels avx2_kernels = {
    "avx2", has_avx2, true, count, pack, portable::unpack, prepare, multiply,
};
}  // namespace racdeploy

#else

namespace racdeploy {
const Kernels avx2_kernels = {"avx2", [] { return false; }};
}  // namespace racdeploy

#endif
