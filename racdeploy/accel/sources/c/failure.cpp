#include "failure.h"

#include <cstdarg>
#include <cstdio>

namespace racdeploy::c {
namespace {

thread_local char message[512] = "";  // no memory has to be there to say that there is none
thread_local racdeploy_status status_of_thread = RACDEPLOY_OK;

// A name from a file may hold anything, and a line that is cut off may end within a letter.
void make_printable(char* text) {
    for (; *text; text++) {
        const auto byte = static_cast<unsigned char>(*text);
        if (byte < 32 || byte > 126) *text = '?';
    }
}

}  // namespace

bool fail(racdeploy_status status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);

    make_printable(message);
    status_of_thread = status;
    return false;
}

racdeploy_status last_status() { return status_of_thread; }

}  // namespace racdeploy::c

extern "C" const char* racdeploy_last_error(void) { return racdeploy::c::message; }
