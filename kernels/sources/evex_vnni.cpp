// The kernels of avx_vnni.cpp in the encoding of AVX-512 VNNI with VL: for processors that have no other one and lack
// what the AVX-512 kernels need beside it.
#include "kernels.h"

#if !defined(__AVXVNNI__) && defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX2__) && \
    defined(__FMA__) && defined(__F16C__) && defined(__BMI2__) && defined(__POPCNT__)
#include "avx2_kernels.h"

namespace racdeploy {
namespace {

bool runs_here() {
    return has_avx2() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

const Kernels evex_vnni_kernels = {
    "avx_vnni", runs_here, true, count, pack, portable::unpack, prepare, multiply,
};

}  // namespace racdeploy

#else

namespace racdeploy {
const Kernels evex_vnni_kernels = {"avx_vnni", [] { return false; }};
}  // namespace racdeploy

#endif
