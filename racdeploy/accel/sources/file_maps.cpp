#include "file_maps.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <new>

#ifdef __GLIBC__
#include <malloc.h>
#endif

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

bool fits_k_rows(const SparseMatrix& matrix, int64_t limit) {
    const int64_t row = k_row_bytes(matrix.quant, matrix.pattern, matrix.columns);
    return matrix.offsets[0] == 0 && matrix.offsets[1] == row && matrix.rows * row <= limit;
}

// Does found(line) hold for a line of a file in /proc? What follows 511 characters of a line is left out.
template <typename Found>
bool any_line(const char* path, const Found& found) {
    FILE* file = std::fopen(path, "re");
    if (!file) return false;

    char line[512], rest[512];
    bool any = false;
    while (!any && std::fgets(line, sizeof line, file)) {
        any = found(line);
        for (const char* end = line; !std::strchr(end, '\n') && std::fgets(rest, sizeof rest, file);) end = rest;
    }
    std::fclose(file);
    return any;
}

// The part of this process's read-only file maps that a piece of memory lies in; empty where it is in none.
FileMap look_up_map(uintptr_t piece, size_t size) {
    unsigned long start = 0, stop = 0, inode = 0;
    char access[5] = "";
    const bool found = any_line("/proc/self/maps", [&](const char* line) {
        if (std::sscanf(line, "%lx-%lx %4s %*x %*s %lu", &start, &stop, access, &inode) != 4) return false;
        return start <= piece && piece + size <= stop && !std::strcmp(access, "r--s") && inode != 0;
    });
    return found ? FileMap{start, stop} : FileMap{};
}

}  // namespace

std::shared_ptr<KeptFile> KeptFile::map(int descriptor, int64_t bytes) {
    if (bytes <= 0) return nullptr;
    try {
        std::shared_ptr<KeptFile> file(new KeptFile);
        file->bytes_ = bytes;
        file->reserved_ = map_memory(bytes + huge_page, PROT_NONE);
        auto* reserved = static_cast<uint8_t*>(file->reserved_.get());
        if (!reserved) return nullptr;

        // The file begins where a huge page does: those of the system's cache can then be mapped whole.
        auto* begin = reserved + -reinterpret_cast<uintptr_t>(reserved) % huge_page;
        if (mmap(begin, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, descriptor, 0) == MAP_FAILED) return nullptr;
        madvise(begin, bytes, MADV_HUGEPAGE);  // what comes from the disk comes in huge pages, too
        file->data_ = begin;
        return file;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

bool KeptFile::is_huge() const {
    static_cast<void>(*static_cast<volatile const uint8_t*>(data_));
    bool ours = false;
    unsigned long start = 0, end = 0, kilobytes = 0;
    return any_line("/proc/self/smaps", [&](const char* line) {
        if (std::sscanf(line, "%lx-%lx ", &start, &end) == 2) ours = start == reinterpret_cast<uintptr_t>(data_);
        const bool counts = !std::strncmp(line, "FilePmdMapped:", 14) || !std::strncmp(line, "ShmemPmdMapped:", 15);
        return ours && counts && std::sscanf(std::strchr(line, ':') + 1, "%lu", &kilobytes) == 1 && kilobytes > 0;
    });
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
    const auto found = places_.find(name);
    if (found == places_.end()) return false;
    const Place& place = found->second;
    if (place.quant != static_cast<int64_t>(quant) || place.rows != rows || place.columns != columns) return false;
    if (place.pattern < 0 || place.pattern > 2) return false;

    const auto pattern = static_cast<Pattern>(place.pattern);
    if (!can_have(quant, pattern)) return false;
    if (is_k_quant(quant) && columns % group_weights) return false;

    const Parts parts(quant, rows, columns);
    const int64_t longest_row = 2 * padded(columns) + slack_bytes;
    if (place.begin < 0 || place.begin % 64 || place.begin > bytes_) return false;
    const int64_t room = bytes_ - place.begin;
    if (place.bytes < parts.values + slack_bytes || place.bytes > room) return false;
    if (room - place.bytes < longest_row) return false;

    matrix = parts.matrix(data_ + place.begin, quant, pattern, rows, columns);
    const int64_t limit = place.bytes - parts.values - slack_bytes;
    return is_k_quant(quant) ? fits_k_rows(matrix, limit) : ascend(matrix.offsets, rows, limit);
}

void forget_mapped(FileMap& map, const void* data, size_t size, bool first_time) {
    static std::atomic<const void*> not_mapped{nullptr};  // llama.cpp reads every tensor into one place: looked up once
    if (data == not_mapped) return;

    const auto begin = reinterpret_cast<uintptr_t>(data);
    if (!first_time || begin < map.begin || begin + size > map.end) map = look_up_map(begin, size);
    if (!map.end) {
        not_mapped = data;
        return;
    }

    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + size) / page * page;
    if (first >= last) return;
    // A huge page would come back whole with the next tensor that is read from it.
    madvise(reinterpret_cast<void*>(first), last - first, MADV_NOHUGEPAGE);
    madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

void give_back_heap() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

}  // namespace racdeploy
