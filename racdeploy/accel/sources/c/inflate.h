// Raw deflate streams (RFC 1951), as strict as zlib, so that an app needs no zlib of its own.
#pragma once
#include <cstddef>
#include <cstdint>

namespace racdeploy::c {

// Inflate a stream that has to take all of `stored` and give exactly so many bytes; false where it does not.
bool inflate(const uint8_t* stored, size_t stored_bytes, uint8_t* plain, size_t plain_bytes);

}  // namespace racdeploy::c
