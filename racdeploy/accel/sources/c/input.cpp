#include "input.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "failure.h"

namespace racdeploy::c {
namespace {

constexpr int64_t read_bytes = 1 << 18;
constexpr size_t most_at_once = 1 << 30;  // macOS takes no more than 2 GB
constexpr int64_t largest_file = int64_t{1} << 50;  // of which no sum of sizes overflows

}  // namespace

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    std::swap(ours_, other.ours_);
    return *this;
}

Descriptor::~Descriptor() {
    if (ours_) ::close(number_);
}

bool Descriptor::close() {
    const bool closed = !ours_ || ::close(number_) == 0;
    ours_ = false;
    return closed || fail(RACDEPLOY_SYSTEM, "a file cannot be closed: %s", std::strerror(errno));
}

bool Input::open(const char* path) {
    if (!path || !*path) return fail(RACDEPLOY_USAGE, "a path is missing");

    file_ = Descriptor(::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), true);  // opening a pipe would wait for ever
    if (file_.number() < 0) return fail(RACDEPLOY_SYSTEM, "%.300s cannot be opened: %s", path, std::strerror(errno));
    return look();
}

bool Input::borrow(int descriptor) {
    file_ = Descriptor(descriptor);
    return look();
}

bool Input::look() {
    struct stat found;
    if (fstat(file_.number(), &found))
        return fail(RACDEPLOY_SYSTEM, "the file cannot be read: %s", std::strerror(errno));
    if (!S_ISREG(found.st_mode)) return fail(RACDEPLOY_DAMAGED, "it is not a file: give a .gguf or .racgguf file");
    size_ = found.st_size;
    return size_ <= largest_file || fail(RACDEPLOY_DAMAGED, "it is larger than any model");
}

bool Input::read(int64_t position, void* data, size_t bytes) const {
    auto* place = static_cast<char*>(data);
    while (bytes) {
        const ssize_t got = pread(file_.number(), place, std::min(bytes, most_at_once), position);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return fail(RACDEPLOY_SYSTEM, "the file cannot be read: %s", std::strerror(errno));
        if (!got) return fail(RACDEPLOY_DAMAGED, "the file ends early: it changed while it was read");
        place += got;
        position += got;
        bytes -= static_cast<size_t>(got);
    }
    return true;
}

bool write_all(int descriptor, const void* data, size_t bytes) {
    const auto* place = static_cast<const char*>(data);
    while (bytes) {
        const ssize_t put = write(descriptor, place, std::min(bytes, most_at_once));
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return fail(RACDEPLOY_SYSTEM, "the plain file cannot be written: %s", std::strerror(errno));
        place += put;
        bytes -= static_cast<size_t>(put);
    }
    return true;
}

bool Stream::has(int64_t bytes) const {
    if (bytes <= left()) return true;
    return fail(RACDEPLOY_DAMAGED, "%lld bytes are wanted where %lld are left", static_cast<long long>(bytes),
                static_cast<long long>(left()));
}

bool Stream::skip(int64_t bytes) {
    if (!has(bytes)) return false;
    const int64_t here = std::min(bytes, static_cast<int64_t>(ahead_.size() - taken_));
    taken_ += static_cast<size_t>(here);
    next_ += bytes - here;
    return true;
}

const uint8_t* Stream::take(int64_t bytes) {
    if (!has(bytes)) return nullptr;

    const auto here = static_cast<int64_t>(ahead_.size() - taken_);
    if (bytes > here) {
        const int64_t more = std::min(end_ - next_, std::max(bytes - here, read_bytes - here));
        ahead_.erase(ahead_.begin(), ahead_.begin() + static_cast<std::ptrdiff_t>(taken_));
        taken_ = 0;
        ahead_.resize(static_cast<size_t>(here + more));
        if (!input_.read(next_, &ahead_[static_cast<size_t>(here)], static_cast<size_t>(more))) {
            ahead_.resize(static_cast<size_t>(here));
            return nullptr;
        }
        next_ += more;
    }

    const uint8_t* taken = ahead_.data() + taken_;
    taken_ += static_cast<size_t>(bytes);
    return taken;
}

}  // namespace racdeploy::c
