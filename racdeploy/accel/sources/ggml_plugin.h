// The buffer type that the plug-in adds to ggml's CPU backend.
#pragma once
#include "ggml_abi.h"
#include "sparse_matrix.h"

namespace racdeploy {

// Ours, once it is among the CPU backend's extra buffer types; nullptr where the backend did not take it.
ggml_backend_buffer_type_t sparse_buffer_type();

// The backend's others: their list ends with nullptr.
ggml_backend_buffer_type_t* extra_buffer_types();

}  // namespace racdeploy
