// The functions of racdeploy.h that unpack containers. They need nothing of ggml.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "container.h"
#include "failure.h"
#include "input.h"

namespace racdeploy::c {
namespace {

// A file beside its final name until it is whole; deleted where it does not get there.
class PartialFile {
public:
    explicit PartialFile(const char* out) : out_(out), partial_(out_ + ".partial") {}
    ~PartialFile() {
        if (made_) ::unlink(partial_.c_str());
    }

    bool create() {
        ::unlink(partial_.c_str());  // that of a killed process; a link there is not followed
        file_ = Descriptor(::open(partial_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666), true);
        made_ = file_.number() >= 0;
        return made_ || failed("cannot be written");
    }

    bool has_space(int64_t bytes) const {
        struct statvfs disk;
        if (fstatvfs(file_.number(), &disk)) return true;  // it will show
        const double free = static_cast<double>(disk.f_bavail) * static_cast<double>(disk.f_frsize);
        return static_cast<double>(bytes) <= free ||
               fail(RACDEPLOY_SYSTEM, "%lld MB are needed and %.0f MB free: free some, or choose another place",
                    static_cast<long long>(bytes >> 20), free / (1 << 20));
    }

    int descriptor() const { return file_.number(); }

    bool finish() {
        if (fsync(file_.number()) || !file_.close() || std::rename(partial_.c_str(), out_.c_str()))
            return failed("cannot be written");
        made_ = false;
        return true;
    }

private:
    bool failed(const char* what) const {
        return fail(RACDEPLOY_SYSTEM, "%.300s %s: %s", out_.c_str(), what, std::strerror(errno));
    }

    std::string out_, partial_;
    Descriptor file_;
    bool made_ = false;
};

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
        if (!file.create() || !file.has_space(opened.plain_bytes())) return false;
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
