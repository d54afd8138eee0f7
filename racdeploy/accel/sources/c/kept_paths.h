// Where a kept file is, and what is known of one that was looked through before. Needs nothing of ggml.
#pragma once
#include <string>

namespace racdeploy::c {

// The kept file of a model, which may be gone, in a folder.
std::string kept_path(const std::string& folder, const std::string& gguf);

// Path, size, times and inode, which tell a file from a changed one; empty where there is none.
std::string file_state(const std::string& path);

// Is it a file of this user that nobody else may write?
bool is_private(const std::string& path);

// What remembers, in a file beside it, that a file was right as it is now.
class CheckedOnce {
public:
    explicit CheckedOnce(const std::string& path) : record_(path + ".checked"), state_(file_state(path)) {}
    bool is_known() const;
    void remember() const;  // where that can be written

private:
    std::string record_, state_;
};

// Delete a kept file and what is known of it; false after fail().
bool forget_kept(const std::string& path);

}  // namespace racdeploy::c
