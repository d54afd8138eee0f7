#include "partial_file.h"

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>

#include "failure.h"

namespace racdeploy::c {

PartialFile::~PartialFile() {
    if (made_) ::unlink(partial_.c_str());
}

bool PartialFile::create(unsigned mode) {
    std::random_device random;
    char suffix[32];
    std::snprintf(suffix, sizeof(suffix), ".%08x%08x.partial", random(), random());
    partial_ = out_ + suffix;
    file_ = Descriptor(::open(partial_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, mode), true);
    made_ = file_.number() >= 0;
    return made_ || failed();
}

bool PartialFile::has_space(int64_t bytes) const {
    struct statvfs disk;
    if (fstatvfs(file_.number(), &disk)) return true;  // it will show
    const double free = static_cast<double>(disk.f_bavail) * static_cast<double>(disk.f_frsize);
    return static_cast<double>(bytes) <= free ||
           fail(RACDEPLOY_SYSTEM, "%lld MB are needed and %.0f MB free: free some, or choose another place",
                static_cast<long long>(bytes >> 20), free / (1 << 20));
}

bool PartialFile::finish() {
    if (fsync(file_.number()) || !file_.close() || std::rename(partial_.c_str(), out_.c_str())) return failed();
    made_ = false;
    return true;
}

bool PartialFile::failed() const {
    return fail(RACDEPLOY_SYSTEM, "%.300s cannot be written: %s", out_.c_str(), std::strerror(errno));
}

}  // namespace racdeploy::c
