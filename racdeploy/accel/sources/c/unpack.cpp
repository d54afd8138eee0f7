// The functions of racdeploy.h that unpack containers. They need nothing of ggml.
#include <utility>

#include "container.h"
#include "failure.h"
#include "input.h"
#include "partial_file.h"

namespace racdeploy::c {
namespace {

bool open_path(const char* path, Container& container) {
    Input input;
    return input.open(path) && container.open(std::move(input));
}

}  // namespace
}  // namespace racdeploy::c

using namespace racdeploy::c;

extern "C" const char* racdeploy_version(void) { return RACDEPLOY_VERSION; }

extern "C" racdeploy_status racdeploy_plain_size(const char* container, uint64_t* size_bytes) {
    return guarded([&] {
        if (!size_bytes) return fail(RACDEPLOY_USAGE, "there is no place for the size");
        *size_bytes = 0;
        Container opened;
        if (!open_path(container, opened)) return false;
        *size_bytes = static_cast<uint64_t>(opened.plain_bytes());
        return true;
    });
}

extern "C" racdeploy_status racdeploy_unpack(const char* container, const char* out) {
    return guarded([&] {
        if (!out || !*out) return fail(RACDEPLOY_USAGE, "the path of the plain file is missing");
        Container opened;
        if (!open_path(container, opened)) return false;

        PartialFile file(out);
        if (!file.create(0666) || !file.has_space(opened.plain_bytes())) return false;
        const auto write = [&](const void* data, size_t bytes) { return write_all(file.descriptor(), data, bytes); };
        return opened.unpack(write) && file.finish();
    });
}

extern "C" racdeploy_status racdeploy_unpack_descriptor(int container, int out) {
    return guarded([&] {
        Input input;
        Container opened;
        if (!input.borrow(container) || !opened.open(std::move(input))) return false;
        return opened.unpack([&](const void* data, size_t bytes) { return write_all(out, data, bytes); });
    });
}
