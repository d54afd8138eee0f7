#include "load_memory.h"

#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>

namespace racdeploy {
namespace {

// The part of this process's read-only file maps that a piece of memory lies in; empty where it is in none.
FileMap look_up_map(uintptr_t piece, size_t size) {
    FILE* maps = std::fopen("/proc/self/maps", "re");
    if (!maps) return {};

    unsigned long start = 0, stop = 0, inode = 0;
    char access[5] = "";
    bool found = false;
    char line[512];
    while (!found && std::fgets(line, sizeof line, maps)) {
        if (std::sscanf(line, "%lx-%lx %4s %*x %*s %lu", &start, &stop, access, &inode) == 4)
            found = start <= piece && piece + size <= stop && !std::strcmp(access, "r--s") && inode != 0;
        while (!std::strchr(line, '\n') && std::fgets(line, sizeof line, maps)) {
        }  // the rest of a long name
    }
    std::fclose(maps);
    return found ? FileMap{start, stop} : FileMap{};
}

}  // namespace

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
