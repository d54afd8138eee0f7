#include <racdeploy.h>

static_assert(sizeof(racdeploy_thresholds) == 5 * sizeof(double));
