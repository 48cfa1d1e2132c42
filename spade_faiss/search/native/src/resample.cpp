#include "resample.hpp"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace spade {
namespace {

// Rows that are resampled together along their columns: one instruction works on as many.
constexpr int kLanes = 8;

void add_row(const float* row, float weight, int w, float* sum) {
    for (int x = 0; x < w; ++x) sum[x] += weight * row[x];
}

// The sums for the rows of a block, interleaved: cell x of row r is at lanes[x * kLanes + r].
void gather_rows(const float* map, int w, const AxisTaps& rows, int first, int count, float* sum, float* lanes) {
    for (int r = 0; r < count; ++r) {
        const std::size_t at = static_cast<std::size_t>(first + r) * rows.taps;
        std::fill(sum, sum + w, 0.0f);
        for (int t = 0; t < rows.taps; ++t)
            add_row(map + static_cast<std::size_t>(rows.positions[at + t]) * w, rows.weights[at + t], w, sum);
        for (int x = 0; x < w; ++x) lanes[x * kLanes + r] = sum[x];
    }
}

void resample_columns(const float* lanes, const AxisTaps& columns, int count, float* out) {
    for (int c = 0; c < columns.length; ++c) {
        const std::size_t at = static_cast<std::size_t>(c) * columns.taps;
        float sum[kLanes] = {};
        for (int t = 0; t < columns.taps; ++t) {
            const float weight = columns.weights[at + t];
            const float* cell = lanes + static_cast<std::size_t>(columns.positions[at + t]) * kLanes;
            for (int r = 0; r < kLanes; ++r) sum[r] += weight * cell[r];
        }
        for (int r = 0; r < count; ++r) out[static_cast<std::size_t>(r) * columns.length + c] = sum[r];
    }
}

}  // namespace

void resample(const float* maps, int n, int h, int w, const AxisTaps& rows, const AxisTaps& columns, float* out) {
    std::vector<float> sum(w), lanes(static_cast<std::size_t>(w) * kLanes);
    for (int i = 0; i < n; ++i)
        for (int first = 0; first < rows.length; first += kLanes) {
            const int count = std::min(kLanes, rows.length - first);
            gather_rows(maps + static_cast<std::size_t>(i) * h * w, w, rows, first, count, sum.data(), lanes.data());
            const std::size_t row = static_cast<std::size_t>(i) * rows.length + first;
            resample_columns(lanes.data(), columns, count, out + row * columns.length);
        }
}

}  // namespace spade
