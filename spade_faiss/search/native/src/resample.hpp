// Maps that are resized and smoothed: linear along each axis, so that a few weighted cells make up a pixel.
#pragma once

#include <cstdint>

namespace spade {

// How an axis is resampled: pixel i is the sum of weights[i * taps + t] * cell[positions[i * taps + t]], in the order of t.
struct AxisTaps {
    int length;  // pixels
    int taps;
    const std::int32_t* positions;
    const float* weights;
};

// Resamples n maps (h, w) along their rows and then along their columns, into (n, rows.length, columns.length). Sums are
// float32 and in the order of the taps, so that they are those of a sparse product.
void resample(const float* maps, int n, int h, int w, const AxisTaps& rows, const AxisTaps& columns, float* out);

}  // namespace spade
