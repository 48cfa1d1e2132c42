#include "search.hpp"

#include <immintrin.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "bounds.hpp"
#include "distance.hpp"
#include "floats.hpp"
#include "nearest.hpp"
#include "target.hpp"

namespace spade {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// A query for which one in so many of a block's rows are evaluated gained nothing from the filter.
constexpr int kDenseShare = 4;

// Memory that each thread keeps from call to call, because allocating it takes as long as a search.
struct Workspace {
    std::vector<float> minima, thresholds, least;
    std::vector<std::int32_t> least_group;
    std::vector<std::uint16_t> refined, within;

    template <typename T>
    static T* at_least(std::vector<T>& memory, std::size_t size) {
        if (memory.size() < size) memory.resize(size);
        return memory.data();
    }
};

Workspace& workspace() {
    static thread_local Workspace own;
    return own;
}

// Groups that are screened at a time: the queries' thresholds fall from one to the next.
constexpr int kScreenedGroups = 64;

// As many groups as fill the cache, an even number: an AMX tile holds two.
int groups_at_a_time(const SimdLevel& level, const RowPack& rows) {
    return std::max(2, level.chunk_bytes / (rows.stride * kGroup) / 2 * 2);
}

// A search of all queries in one block.
//
// It goes group by group, so that a group's rows are decoded once for all queries that refine it.
class BlockSearch {
public:
    BlockSearch(const SimdLevel& level, const QueryPack& queries, const Vectors& xq, const RowPack& rows, const Vectors& xb,
                float margin)
        : level_(level),
          queries_(queries),
          rows_(rows),
          xq_(xq),
          xb_(xb),
          margin_(margin),
          bounds_(queries, rows, margin),
          panels_(queries.panels),
          groups_((rows.count + kGroup - 1) / kGroup),
          d_(xq.d),
          padded_(round_up(xq.d, kDistanceAlign)),
          thresholds_(Workspace::at_least(workspace().thresholds, static_cast<std::size_t>(panels_) * kPanel)),
          wanted_(panels_),
          decoded_(static_cast<std::size_t>(kGroup) * padded_),
          padded_query_(padded_) {}

    SPADE_TARGET_AVX2 SearchStats run(const float* bound, int k, float* sq_dist, std::int64_t* row) {
        nearest_.resize(queries_.count);
        evaluated_.assign(queries_.count, 0);
        for (int i = 0; i < panels_ * kPanel; ++i) thresholds_[i] = -kInfinity;
        for (int i = 0; i < queries_.count; ++i) {
            const std::size_t first = static_cast<std::size_t>(i) * k;
            nearest_[i] = {sq_dist + first, row + first, k, bound[i]};
            if (!(bound[i] >= 0)) continue;
            thresholds_[i] = bounds_.threshold(i, bound[i]);
            wanted_[i / kPanel] |= static_cast<std::uint16_t>(1u << i % kPanel);
        }
        const auto is_unbounded = [](float threshold) { return threshold == kInfinity; };
        if (std::any_of(thresholds_, thresholds_ + queries_.count, is_unbounded))
            search_by_minima(k);
        else
            search_screened();
        SearchStats stats;
        for (int i = 0; i < queries_.count; ++i) {
            stats.evaluated += evaluated_[i];
            stats.dense += evaluated_[i] * kDenseShare >= rows_.count && evaluated_[i] > kGroup * (k / kGroup + 2);
        }
        return stats;
    }

private:
    // Filters the whole block first: the least of the minima say where to begin.
    SPADE_TARGET_AVX2 void search_by_minima(int k) {
        minima_ = filter_block(level_, queries_, rows_);
        const std::size_t size = static_cast<std::size_t>(panels_) * rows_.groups;
        refined_ = Workspace::at_least(workspace().refined, size);
        std::fill_n(refined_, size, std::uint16_t{0});
        const auto is_unbounded = [](float threshold) { return threshold == kInfinity; };
        if (std::any_of(thresholds_, thresholds_ + queries_.count, is_unbounded)) evaluate_most_promising(k);
        for (int group = 0; group < groups_; ++group)
            for (int panel = 0; panel < panels_; ++panel) refine_all(group, panel, open_queries(group, panel));
    }

    // Screens some groups at a time by the thresholds of then, and refines what is left.
    SPADE_TARGET_AVX2 void search_screened() {
        const int chunk = std::min(kScreenedGroups, groups_at_a_time(level_, rows_));
        std::uint16_t* const within = Workspace::at_least(workspace().within, static_cast<std::size_t>(panels_) * chunk);
        for (int first = 0; first < rows_.groups; first += chunk) {
            const int last = std::min(rows_.groups, first + chunk);
            level_.screen(rows_, {first, last}, queries_, {thresholds_, margin_}, within);
            const std::uint16_t* of_panel = within;
            for (int group = first; group < std::min(last, groups_); ++group)
                for (int panel = 0; panel < panels_; ++panel, ++of_panel)
                    if (*of_panel) refine_all(group, panel, *of_panel & wanted_[panel]);
        }
    }

    SPADE_TARGET_AVX2 SPADE_INLINE void refine_all(int group, int panel, unsigned which) {
        for (; which; which &= which - 1) refine(group, panel * kPanel + __builtin_ctz(which));
    }

    std::size_t at(int group, int panel) const { return static_cast<std::size_t>(group) * panels_ + panel; }
    const float* minima(int group, int panel) const { return minima_ + at(group, panel) * kPanel; }

    // The queries of a panel that have to refine a group, as bits.
    SPADE_TARGET_AVX2 SPADE_INLINE unsigned open_queries(int group, int panel) const {
        const unsigned within = bounds_.queries_within(group, panel, minima(group, panel), thresholds_ + panel * kPanel);
        return within & wanted_[panel] & ~refined_[at(group, panel)];
    }

    // Evaluates the most promising rows of each query that has no bound yet: their distances bound all others.
    SPADE_TARGET_AVX2 void evaluate_most_promising(int k) {
        const int queries = panels_ * kPanel;
        float* least = Workspace::at_least(workspace().least, queries);
        std::int32_t* least_group = Workspace::at_least(workspace().least_group, queries);
        std::fill_n(least, queries, kInfinity);
        std::fill_n(least_group, queries, 0);
        for (int group = 0; group < groups_; ++group)
            for (int i = 0; i < queries; i += 8) {
                const __m256 value = _mm256_loadu_ps(minima(group, 0) + i), before = _mm256_loadu_ps(least + i);
                const __m256 is_less = _mm256_cmp_ps(value, before, _CMP_LT_OQ);
                const __m256 group_before = _mm256_loadu_ps(reinterpret_cast<const float*>(least_group + i));
                const __m256 this_group = _mm256_castsi256_ps(_mm256_set1_epi32(group));
                _mm256_storeu_ps(least + i, _mm256_blendv_ps(before, value, is_less));
                _mm256_storeu_ps(reinterpret_cast<float*>(least_group + i),
                                 _mm256_blendv_ps(group_before, this_group, is_less));
            }
        for (int i = 0; i < queries_.count; ++i) {
            if (thresholds_[i] != kInfinity) continue;
            if (k == 1) {
                evaluate_best_row(least_group[i], i);
            } else {
                for (int group : most_promising_groups(i, k)) {
                    refine(group, i);
                    refined_[at(group, i / kPanel)] |= static_cast<std::uint16_t>(1u << i % kPanel);
                }
            }
        }
    }

    // Evaluates the row of a group whose estimate is least.
    SPADE_TARGET_AVX2 void evaluate_best_row(int group, int i) {
        alignas(32) float values[kGroup];
        _mm256_store_ps(values, bounds_.estimates(group, i));
        const int count = std::min(kGroup, rows_.count - group * kGroup);
        const int r = static_cast<int>(std::min_element(values, values + count) - values);
        decode_rows(group, 1u << r);
        evaluate(query(i), r, r, group, i);
    }

    // The groups with the least minima for query i: as many as hold k rows, and one more.
    std::vector<int> most_promising_groups(int i, int k) const {
        const int count = std::min(groups_, k / kGroup + 2);
        std::vector<int> order(groups_);
        for (int group = 0; group < groups_; ++group) order[group] = group;
        const auto precedes = [&](int a, int b) {
            const float least_a = minima(a, i / kPanel)[i % kPanel], least_b = minima(b, i / kPanel)[i % kPanel];
            return least_a < least_b || (least_a == least_b && a < b);
        };
        std::partial_sort(order.begin(), order.begin() + count, order.end(), precedes);
        order.resize(count);
        return order;
    }

    // Evaluates the rows of a group that query i cannot rule out.
    SPADE_TARGET_AVX2 void refine(int group, int i) {
        if (!nearest_[i].is_open_to(group * kGroup)) return;
        const int count = std::min(kGroup, rows_.count - group * kGroup);
        unsigned which = bounds_.rows_within(group, i, _mm256_set1_ps(thresholds_[i])) & ((1u << count) - 1);
        if (nearest_[i].k == 1) which &= ~static_cast<unsigned>(rows_.repeats[group]);  // of equal rows the first one counts
        if (which == 0) return;
        decode_rows(group, which);
        const float* const q = query(i);
        while (which) {  // two rows at a time, because their sums do not wait for each other
            const int first = __builtin_ctz(which);
            which &= which - 1;
            const int second = which ? __builtin_ctz(which) : first;
            which &= which - 1;
            evaluate(q, first, second, group, i);
        }
    }

    // Computes the distances of query i to two rows of the decoded group, which may be the same row.
    SPADE_TARGET_AVX2 SPADE_INLINE void evaluate(const float* q, int first, int second, int group, int i) {
        const float* const x[2] = {decoded_row(first), decoded_row(second)};
        float found[2];
        sq_distances<2>(q, x, padded_, found);
        nearest_[i].offer(found[0], static_cast<std::int64_t>(group) * kGroup + first);
        if (second != first) nearest_[i].offer(found[1], static_cast<std::int64_t>(group) * kGroup + second);
        evaluated_[i] += 1 + (second != first);
        thresholds_[i] = bounds_.threshold(i, nearest_[i].limit());
    }

    float* decoded_row(int r) { return decoded_.data() + static_cast<std::size_t>(r) * padded_; }

    // Decodes those rows of a group, given as bits, that are not decoded yet.
    SPADE_TARGET_AVX2 SPADE_INLINE void decode_rows(int group, unsigned which) {
        if (decoded_group_ != group) is_decoded_ = 0;
        decoded_group_ = group;
        for (unsigned missing = which & ~is_decoded_; missing; missing &= missing - 1) {
            const int r = __builtin_ctz(missing);
            decode(xb_.row(group * kGroup + r), xb_.type, xb_.codes, d_, padded_, decoded_row(r));
        }
        is_decoded_ |= which;
    }

    // The padded channels of query i.
    SPADE_TARGET_AVX2 SPADE_INLINE const float* query(int i) {
        const auto* q = static_cast<const float*>(xq_.row(i));
        if (d_ == padded_) return q;
        decode(q, ElementType::kFloat32, nullptr, d_, padded_, padded_query_.data());
        return padded_query_.data();
    }

    const SimdLevel& level_;
    const QueryPack& queries_;
    const RowPack& rows_;
    const Vectors xq_, xb_;
    const float margin_;
    const Bounds bounds_;
    const float* minima_ = nullptr;
    const int panels_, groups_;            // groups_ counts those that hold a row
    const int d_, padded_;                 // channels, and what they are padded to for direct distances
    float* const thresholds_;              // (padded queries)
    std::uint16_t* refined_ = nullptr;     // (groups, panels): the queries that have refined the group already, as bits
    std::vector<std::uint16_t> wanted_;    // (panels): the queries for which something is wanted, as bits
    Buffer<float> decoded_;                // (kGroup, padded): rows of a group
    Buffer<float> padded_query_;           // (padded)
    int decoded_group_ = -1;               // the group of which rows are decoded
    unsigned is_decoded_ = 0;              // which of its rows are, as bits
    std::vector<Nearest> nearest_;         // (queries)
    std::vector<std::int32_t> evaluated_;  // (queries): how many direct distances were computed
};

}  // namespace

const float* filter_block(const SimdLevel& level, const QueryPack& queries, const RowPack& rows) {
    const std::size_t size = static_cast<std::size_t>(queries.panels) * rows.groups * kPanel;
    float* minima = Workspace::at_least(workspace().minima, size);
    const int chunk = groups_at_a_time(level, rows);
    for (int group = 0; group < rows.groups; group += chunk)
        level.filter(rows, {group, std::min(rows.groups, group + chunk)}, queries,
                     minima + static_cast<std::size_t>(group) * queries.panels * kPanel);
    return minima;
}

SearchStats search(const SimdLevel& level, const QueryPack& queries, const Vectors& xq, const RowPack& rows, const Vectors& xb,
                   const float* bound, int k, float margin, float* sq_dist, std::int64_t* row) {
    const ScopedDefaultFloatMode float_mode;
    const std::size_t found = static_cast<std::size_t>(xq.count) * k;
    std::fill_n(sq_dist, found, kInfinity);
    std::fill_n(row, found, -1);
    return BlockSearch(level, queries, xq, rows, xb, margin).run(bound, k, sq_dist, row);
}

}  // namespace spade
