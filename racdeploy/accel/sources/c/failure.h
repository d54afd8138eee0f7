// How functions of the C library say what went wrong: false, and the reason on this thread. Nothing throws but what
// containers throw where memory ends, which the functions of racdeploy.h catch.
#pragma once
#include <exception>
#include <new>

#include "racdeploy.h"

namespace racdeploy::c {

// Keep the reason of this thread; false, so that a function can return it.
[[gnu::format(printf, 2, 3)]] bool fail(racdeploy_status status, const char* format, ...);

racdeploy_status last_status();

// Call what returns false after fail(); nothing that it throws goes on.
template <typename Work>
racdeploy_status guarded(const Work& work) noexcept {
    try {
        return work() ? RACDEPLOY_OK : last_status();
    } catch (const std::bad_alloc&) {
        fail(RACDEPLOY_MEMORY, "there is not enough memory: close other models, or free some");
    } catch (const std::exception& error) {
        fail(RACDEPLOY_SYSTEM, "unexpected: %s", error.what());
    } catch (...) {
        fail(RACDEPLOY_SYSTEM, "unexpected");
    }
    return last_status();
}

}  // namespace racdeploy::c
