// AVX2 with VPDPBUSD, which sums up products of bytes in one instruction, as AVX-VNNI encodes it: Intel's consumer
// processors since 2021, AMD's Zen 5. evex_vnni.cpp has the encoding of AVX-512.
#include "kernels.h"

#if defined(__AVXVNNI__) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__BMI2__) && \
    defined(__POPCNT__)
#include "avx2_kernels.h"

namespace racdeploy {
namespace {

bool runs_here() {
    unsigned features = 0, b, c, d;  // gcc 11 and clang 12 know the instructions, but not to ask for them
    return has_avx2() && __get_cpuid_count(7, 1, &features, &b, &c, &d) && features >> 4 & 1;
}

}  // namespace

const Kernels avx_vnni_kernels = {
    "avx_vnni", runs_here, true, count, pack, portable::unpack, prepare, multiply,
};

}  // namespace racdeploy

#else

namespace racdeploy {
const Kernels avx_vnni_kernels = {"avx_vnni", [] { return false; }};
}  // namespace racdeploy

#endif
