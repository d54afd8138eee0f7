// A file that is whole or absent.
#pragma once
#include <cstdint>
#include <string>
#include <utility>

#include "input.h"

namespace racdeploy::c {

// A file beside its final name until it is whole; deleted where it does not get there. Its name until then is drawn:
// others may write the same file at the same time, and the last to finish has it.
class PartialFile {
public:
    explicit PartialFile(std::string out) : out_(std::move(out)) {}
    ~PartialFile();

    bool create(unsigned mode);           // these return false after fail()
    bool has_space(int64_t bytes) const;
    int descriptor() const { return file_.number(); }
    bool finish();

private:
    bool failed() const;

    std::string out_, partial_;
    Descriptor file_;
    bool made_ = false;
};

}  // namespace racdeploy::c
