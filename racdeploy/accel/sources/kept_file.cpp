#include "kept_file.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <new>

#include "kernels.h"

namespace racdeploy {
namespace {

constexpr int64_t huge_page = 2 << 20;

bool ascend(const int64_t* offsets, int64_t rows, int64_t limit) {
    if (offsets[0] != 0 || offsets[rows] > limit) return false;
    for (int64_t r = 0; r < rows; r++)
        if (offsets[r + 1] < offsets[r]) return false;
    return true;
}

}  // namespace

std::shared_ptr<KeptFile> KeptFile::map(int descriptor, int64_t bytes) {
    if (bytes <= 0) return nullptr;
    try {
        std::shared_ptr<KeptFile> file(new KeptFile);
        file->bytes_ = bytes;
        const int anywhere = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

        void* reserved = mmap(nullptr, bytes + huge_page, PROT_NONE, anywhere, -1, 0);
        if (reserved == MAP_FAILED) return nullptr;
        file->reserved_ = reserved;

        // The file begins where a huge page does: those of the system's cache can then be mapped whole.
        auto* begin = static_cast<uint8_t*>(reserved) + -reinterpret_cast<uintptr_t>(reserved) % huge_page;
        if (mmap(begin, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, descriptor, 0) == MAP_FAILED) return nullptr;
        madvise(begin, bytes, MADV_HUGEPAGE);  // what comes from the disk comes in huge pages, too
        file->data_ = begin;
        return file;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

KeptFile::~KeptFile() {
    if (reserved_) munmap(reserved_, bytes_ + huge_page);
}

bool KeptFile::is_huge() const {
    static_cast<void>(*static_cast<volatile const uint8_t*>(data_));
    FILE* maps = std::fopen("/proc/self/smaps", "re");
    if (!maps) return false;

    char line[512];
    bool ours = false;
    unsigned long start = 0, end = 0, kilobytes = 0;
    while (std::fgets(line, sizeof line, maps)) {
        if (std::sscanf(line, "%lx-%lx ", &start, &end) == 2) ours = start == reinterpret_cast<uintptr_t>(data_);
        const bool counts = !std::strncmp(line, "FilePmdMapped:", 14) || !std::strncmp(line, "ShmemPmdMapped:", 15);
        if (ours && counts && std::sscanf(std::strchr(line, ':') + 1, "%lu", &kilobytes) == 1 && kilobytes) break;
        kilobytes = 0;
    }
    std::fclose(maps);
    return kilobytes > 0;
}

bool KeptFile::add(const char* name, const Place& place) {
    try {
        places_[name] = place;
        return true;
    } catch (const std::bad_alloc&) {
        return false;
    }
}

bool KeptFile::find(const char* name, Quant quant, int64_t rows, int64_t columns, SparseMatrix& matrix) const {
    try {
        const auto found = places_.find(name);
        if (found == places_.end()) return false;
        const Place& place = found->second;
        if (place.quant != static_cast<int64_t>(quant) || place.rows != rows || place.columns != columns) return false;
        if (place.pattern != 0 && place.pattern != 1) return false;

        const auto pattern = static_cast<Pattern>(place.pattern);
        const bool two_of_four = pattern == Pattern::two_of_four;
        if (two_of_four && (quant != Quant::q8_0 || columns % 128)) return false;

        const Parts parts(quant, rows, columns);
        const int64_t longest_row = 2 * padded(columns) + slack_bytes;
        if (place.begin < 0 || place.begin % 64 || place.begin > bytes_) return false;
        const int64_t room = bytes_ - place.begin;
        if (place.bytes < parts.values + slack_bytes || place.bytes > room) return false;
        if (room - place.bytes < longest_row) return false;

        matrix = parts.matrix(data_ + place.begin, quant, pattern, rows, columns);
        return ascend(matrix.offsets, rows, place.bytes - parts.values - slack_bytes);
    } catch (const std::bad_alloc&) {
        return false;
    }
}

}  // namespace racdeploy
