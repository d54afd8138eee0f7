// What llama.cpp leaves in memory while it loads a model whose weights are packed: pages of the mapped file, and heap.
#pragma once
#include <cstddef>
#include <cstdint>

namespace racdeploy {

struct FileMap {
    uintptr_t begin = 0, end = 0;
};

// Give back the pages of a mapped file that were read for the last time; the system caches the file as it likes. Memory
// of any other kind is left alone: there it would be lost. `map` is where the file was mapped, and is kept up to date.
// A weight that is written for the first time comes from where the one before came from: the model is being loaded, and
// its file stays mapped until then.
void forget_mapped(FileMap& map, const void* data, size_t size, bool first_time);

// llama.cpp has read every tensor into a place on the heap, which is free by the first product; glibc would keep it.
void give_back_heap();

}  // namespace racdeploy
