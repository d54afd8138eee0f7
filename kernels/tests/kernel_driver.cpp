// The kernels for a processor that is not the tests': reads calls of rac_test_call from stdin, writes their results to
// stdout, until stdin ends. All integers are int64, little-endian.
//
//   call     bytes of the name, name; count, numbers; count, for each array its bytes; the arrays
//   result   what it returned; the arrays, which it may have changed
//
// An array ends where memory ends, but for what keeps its beginning aligned to 64 bytes: who reads beyond it crashes.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

extern "C" int64_t rac_test_call(const char* name, const int64_t* numbers, void* const* arrays);

namespace {

void read_all(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);
}

int64_t read_number() {
    int64_t number = 0;
    read_all(&number, sizeof(number));
    return number;
}

class Guarded {
public:
    explicit Guarded(int64_t bytes) {
        const int64_t page = sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page;
        mapped_ = static_cast<size_t>((pages + 1) * page);
        void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        begin_ = static_cast<uint8_t*>(memory);
        mprotect(begin_ + pages * page, static_cast<size_t>(page), PROT_NONE);
        data_ = begin_ + (pages * page - bytes) / 64 * 64;
    }
    ~Guarded() { munmap(begin_, mapped_); }
    Guarded(const Guarded&) = delete;
    Guarded(Guarded&& other) noexcept : begin_(other.begin_), data_(other.data_), mapped_(other.mapped_) {
        other.begin_ = nullptr;
        other.mapped_ = 1;
    }

    uint8_t* data() const { return data_; }

private:
    uint8_t *begin_ = nullptr, *data_ = nullptr;
    size_t mapped_ = 0;
};

}  // namespace

int main() {
    for (;;) {
        std::string name(static_cast<size_t>(read_number()), '\0');
        read_all(name.data(), name.size());
        std::vector<int64_t> numbers(static_cast<size_t>(read_number()));
        read_all(numbers.data(), numbers.size() * sizeof(int64_t));
        std::vector<int64_t> sizes(static_cast<size_t>(read_number()));
        read_all(sizes.data(), sizes.size() * sizeof(int64_t));

        std::vector<Guarded> arrays;
        std::vector<void*> pointers;
        for (const int64_t size : sizes) {
            arrays.emplace_back(size);
            read_all(arrays.back().data(), static_cast<size_t>(size));
            pointers.push_back(arrays.back().data());
        }

        const int64_t result = rac_test_call(name.c_str(), numbers.data(), pointers.data());
        std::fwrite(&result, sizeof(result), 1, stdout);
        for (size_t i = 0; i < sizes.size(); i++) std::fwrite(pointers[i], 1, static_cast<size_t>(sizes[i]), stdout);
        std::fflush(stdout);
    }
}
