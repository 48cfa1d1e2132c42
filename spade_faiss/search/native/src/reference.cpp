// The filter and the screen in plain C++, which the others must equal bit by bit.
#include <algorithm>
#include <cmath>
#include <limits>

#include "filter.hpp"

namespace spade {
namespace {

// The sum of the products of a row's codes and digits with a query's, without the rows' offset.
std::int32_t dot_of(const RowCodes& rows, int row, const QueryPack& queries, int query) {
    const auto* q =
        queries.codes.data() + static_cast<std::size_t>(query / kPanel) * kPanel * queries.stride + query % kPanel * 4;
    const auto* x = rows.codes + static_cast<std::size_t>(row) * rows.stride;
    std::int32_t dot = queries.initial_dot[query];
    for (int c = 0; c < rows.stride; ++c) dot += x[c] * q[c / 4 * 4 * kPanel + c % 4];
    return dot;
}

float minimum_by_row(const RowCodes& rows, int group, const QueryPack& queries, int query) {
    float least = std::numeric_limits<float>::infinity();
    for (int row = group * kGroup; row < (group + 1) * kGroup; ++row) {
        const float scaled = static_cast<float>(dot_of(rows, row, queries, query)) * rows.step[row];
        const float estimate = std::fma(-scaled, queries.step[query], rows.half_sq_norm[row]);
        least = estimate < least ? estimate : least;
    }
    return least;
}

float minimum_by_digits(const RowCodes& rows, int group, const QueryPack& queries, int query) {
    std::int32_t most = std::numeric_limits<std::int32_t>::min();
    for (int row = group * kGroup; row < (group + 1) * kGroup; ++row) most = std::max(most, dot_of(rows, row, queries, query));
    const float scaled = static_cast<float>(most) * rows.group_step[group];
    return std::fma(-scaled, queries.step[query], rows.least_half_sq_norm[group]);
}

float minimum(const RowCodes& rows, int group, const QueryPack& queries, int query) {
    return rows.has_digits() ? minimum_by_digits(rows, group, queries, query) : minimum_by_row(rows, group, queries, query);
}

}  // namespace

void filter_reference(const RowCodes& rows, GroupRange groups, const QueryPack& queries, float* minima) {
    for (int group = groups.begin; group < groups.end; ++group)
        for (int query = 0; query < queries.panels * kPanel; ++query) *minima++ = minimum(rows, group, queries, query);
}

void screen_reference(const RowCodes& rows, GroupRange groups, const QueryPack& queries, Thresholds thresholds,
                      std::uint16_t* within) {
    const float rounding = rows.rounding;
    for (int group = groups.begin; group < groups.end; ++group) {
        const float norm = rows.max_norm[group], row_norm = thresholds.margin * norm;
        const float row_residual = thresholds.margin * rows.max_residual[group];
        const float rounded = thresholds.margin * rounding * norm * norm;
        for (int panel = 0; panel < queries.panels; ++panel, ++within) {
            *within = 0;
            for (int lane = 0; lane < kPanel; ++lane) {
                const int query = panel * kPanel + lane;
                const float error =
                    std::fma(queries.residual[query], row_norm, std::fma(queries.norm[query], row_residual, rounded));
                const float limit = thresholds.of_query[query] + error;
                if (!(minimum(rows, group, queries, query) > limit)) *within |= static_cast<std::uint16_t>(1u << lane);
            }
        }
    }
}

}  // namespace spade
