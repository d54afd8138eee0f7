#include "kept_paths.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "failure.h"
#include "input.h"
#include "partial_file.h"
#include "sha256.h"

namespace racdeploy::c {
namespace {

#ifdef __APPLE__
constexpr auto modified = &stat::st_mtimespec, changed = &stat::st_ctimespec;
#else
constexpr auto modified = &stat::st_mtim, changed = &stat::st_ctim;
#endif

std::string real_path(const std::string& path) {
    if (char* found = realpath(path.c_str(), nullptr)) {
        const std::string copy = found;
        std::free(found);
        return copy;
    }
    return "";
}

// Of a file that is gone, the real folder and its name.
std::string resolved(const std::string& path) {
    if (const std::string found = real_path(path); !found.empty()) return found;
    const size_t slash = path.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    const std::string found = real_path(folder);
    return (found.empty() ? folder : found) + "/" + path.substr(slash + 1);
}

}  // namespace

std::string kept_path(const std::string& folder, const std::string& gguf) {
    const std::string name = resolved(gguf);
    Sha256 digest;
    digest.update(name.data(), name.size());
    return folder + "/" + digest.hex().substr(0, 32) + ".packed";
}

std::string file_state(const std::string& path) {
    struct stat found;
    if (stat(path.c_str(), &found)) return "";
    std::string state = resolved(path);
    for (const auto number : {static_cast<int64_t>(found.st_size), static_cast<int64_t>((found.*modified).tv_sec),
                              static_cast<int64_t>((found.*modified).tv_nsec),
                              static_cast<int64_t>((found.*changed).tv_sec),
                              static_cast<int64_t>((found.*changed).tv_nsec), static_cast<int64_t>(found.st_ino)})
        state += "|" + std::to_string(number);
    return state + "|";
}

bool is_private(const std::string& path) {
    struct stat found;
    if (lstat(path.c_str(), &found)) return false;
    return S_ISREG(found.st_mode) && found.st_uid == geteuid() && !(found.st_mode & (S_IWGRP | S_IWOTH));
}

bool CheckedOnce::is_known() const {
    Input record;
    if (!is_private(record_) || !record.open(record_.c_str())) return false;
    if (record.size() != static_cast<int64_t>(state_.size())) return false;
    std::string found(state_.size(), '\0');
    return record.read(0, &found[0], found.size()) && found == state_;
}

void CheckedOnce::remember() const {
    PartialFile file(record_);
    if (file.create(0600) && write_all(file.descriptor(), state_.data(), state_.size())) file.finish();
}

bool forget_kept(const std::string& path) {
    ::unlink((path + ".checked").c_str());
    return !::unlink(path.c_str()) || errno == ENOENT ||
           fail(RACDEPLOY_SYSTEM, "%.300s cannot be deleted: %s", path.c_str(), std::strerror(errno));
}

}  // namespace racdeploy::c
