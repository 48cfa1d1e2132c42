// The filter in plain C++, which the others must equal bit by bit.
#include <cmath>
#include <limits>

#include "filter.hpp"

namespace spade {

void filter_reference(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima) {
    for (int panel = 0; panel < queries.panels; ++panel)
        for (int group = groups.begin; group < groups.end; ++group)
            for (int lane = 0; lane < kPanel; ++lane) {
                const int query = panel * kPanel + lane;
                const auto* q = queries.codes.data() + static_cast<std::size_t>(panel) * kPanel * queries.stride + lane * 4;
                float least = std::numeric_limits<float>::infinity();
                for (int row = group * kGroup; row < (group + 1) * kGroup; ++row) {
                    const auto* x = rows.codes + static_cast<std::size_t>(row) * rows.stride;
                    std::int32_t dot = queries.initial_dot[query];
                    for (int c = 0; c < rows.stride; ++c) dot += x[c] * q[c / 4 * 4 * kPanel + c % 4];
                    const float scaled = static_cast<float>(dot) * rows.step[row];
                    const float estimate = std::fma(-scaled, queries.step[query], rows.half_sq_norm[row]);
                    least = estimate < least ? estimate : least;
                }
                minima[(static_cast<std::size_t>(group - groups.begin) * queries.panels + panel) * kPanel + lane] = least;
            }
}

}  // namespace spade
