// A file that strangers may have made, read with pread: a map of it would end the process where it becomes shorter.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace racdeploy::c {

// A descriptor, closed at the end where it is ours.
class Descriptor {
public:
    explicit Descriptor(int number = -1, bool ours = false) : number_(number), ours_(ours && number >= 0) {}
    Descriptor(Descriptor&& other) noexcept : number_(other.number_), ours_(other.ours_) { other.ours_ = false; }
    Descriptor& operator=(Descriptor&& other) noexcept;
    ~Descriptor();

    int number() const { return number_; }
    bool close();  // false after fail(): what was written may not have reached the disk

private:
    int number_;
    bool ours_;
};

class Input {
public:
    bool open(const char* path);     // false after fail()
    bool borrow(int descriptor);     // the same
    int64_t size() const { return size_; }
    int descriptor() const { return file_.number(); }

    bool read(int64_t position, void* data, size_t bytes) const;  // all of them; false after fail()

private:
    bool look();
    Descriptor file_;
    int64_t size_ = 0;
};

bool write_all(int descriptor, const void* data, size_t bytes);  // false after fail()

// Consecutive bytes of a part of a file, read ahead. What take() returns stays valid until the next call.
class Stream {
public:
    Stream(const Input& input, int64_t begin, int64_t end) : input_(input), next_(begin), end_(end) {}

    int64_t left() const { return end_ - next_ + static_cast<int64_t>(ahead_.size() - taken_); }
    int64_t position() const { return end_ - left(); }
    const uint8_t* take(int64_t bytes);  // nullptr after fail(): there are fewer
    bool skip(int64_t bytes);            // false after fail()

private:
    bool has(int64_t bytes) const;
    const Input& input_;
    int64_t next_, end_;  // not read yet
    std::vector<uint8_t> ahead_;
    size_t taken_ = 0;
};

}  // namespace racdeploy::c
