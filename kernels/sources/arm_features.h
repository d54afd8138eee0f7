// What an ARM processor can do, asked of the system.
#pragma once

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace racdeploy {
namespace {

constexpr unsigned long capabilities = 16, more_capabilities = 26;  // AT_HWCAP and AT_HWCAP2

// A bit of an entry of Linux's auxiliary vector (AT_HWCAP, AT_HWCAP2), and the name that Apple's systems have for it.
inline bool has_arm_feature([[maybe_unused]] unsigned long entry, [[maybe_unused]] int bit,
                            [[maybe_unused]] const char* name) {
#if defined(__linux__)
    return getauxval(entry) >> bit & 1;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof(has);
    return !sysctlbyname(name, &has, &size, nullptr, 0) && has;
#else
    return false;
#endif
}

}  // namespace
}  // namespace racdeploy
