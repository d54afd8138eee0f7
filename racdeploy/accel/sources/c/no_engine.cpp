// An app that only unpacks: no ggml, no kernels.
#include "engine.h"
#include "failure.h"
#include "kept_file.h"

namespace racdeploy::c {
namespace {

constexpr char absent[] = "the kernels are not in this build of libracdeploy: build it where CMake finds ggml";

}  // namespace

std::string why_no_engine() { return absent; }
const char* instruction_set() { return ""; }
std::string form_of_matrices() { return ""; }
racdeploy_thresholds known_thresholds() { return {}; }
bool count_zeros(const Input&, const Header&, int, std::vector<Zeros>&) { return fail(RACDEPLOY_ENGINE, absent); }
bool enable_next(const std::vector<std::string>&, int) { return fail(RACDEPLOY_ENGINE, absent); }
int64_t packed_by_kernels() { return 0; }
bool measure(int, racdeploy_thresholds&) { return fail(RACDEPLOY_ENGINE, absent); }

bool KeptWeights::find(const std::string&, const std::string&) { return false; }
std::vector<std::string> KeptWeights::names() const { return {}; }
bool KeptWeights::write(const std::string&, const std::vector<std::string>&, const std::string&, const std::string&,
                        bool) {
    return false;
}
bool KeptWeights::use() { return false; }

}  // namespace racdeploy::c
