#include "search.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "lanes.hpp"
#include "target.hpp"

namespace spade {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// A query whose search evaluates this share of a block's rows gained nothing from the filter.
constexpr int kDenseShare = 4;

// The sums of eight vectors' eight numbers each.
SPADE_AVX2 SPADE_INLINE __m256i sums(const __m256i* of) {
    const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(of[0], of[1]), _mm256_hadd_epi32(of[2], of[3]));
    const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(of[4], of[5]), _mm256_hadd_epi32(of[6], of[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

// Squared distances of a query to R rows, all of them padded: 32 sums each, added up by halves.
template <int R>
SPADE_AVX2 SPADE_INLINE void direct(const float* q, const float* const* x, int padded, float* sq_dist) {
    __m256 parts[R][4];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < 4; ++j) parts[r][j] = _mm256_setzero_ps();
    int i = 0;
    for (; i + 32 <= padded; i += 32)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __m256 of_query = _mm256_loadu_ps(q + i + 8 * j);
            for (int r = 0; r < R; ++r) {
                const __m256 left = _mm256_sub_ps(of_query, _mm256_load_ps(x[r] + i + 8 * j));
                parts[r][j] = _mm256_fmadd_ps(left, left, parts[r][j]);
            }
        }
    if (i < padded)
        for (int j = 0; j < 2; ++j) {
            const __m256 of_query = _mm256_loadu_ps(q + i + 8 * j);
            for (int r = 0; r < R; ++r) {
                const __m256 left = _mm256_sub_ps(of_query, _mm256_load_ps(x[r] + i + 8 * j));
                parts[r][j] = _mm256_fmadd_ps(left, left, parts[r][j]);
            }
        }
    for (int r = 0; r < R; ++r) {
        const __m256 eight = _mm256_add_ps(_mm256_add_ps(parts[r][0], parts[r][2]), _mm256_add_ps(parts[r][1], parts[r][3]));
        sq_dist[r] = sum(eight);
    }
}

// The nearest rows of one query, ascending by distance, then by row.
struct Nearest {
    float* sq_dist;
    std::int64_t* location;
    int k;
    float bound;

    // Nothing farther counts.
    float limit() const { return std::min(bound, sq_dist[k - 1]); }
    // Whether rows from `row` on can still count: of equal distances the first row stays, and nothing is below 0.
    bool open(int row) const { return k > 1 || sq_dist[0] > 0 || location[0] > row; }

    void offer(float found, std::int64_t row) {
        if (!(found <= bound) || !before(found, row, k - 1)) return;
        int place = k - 1;
        for (; place > 0 && before(found, row, place - 1); --place) {
            sq_dist[place] = sq_dist[place - 1];
            location[place] = location[place - 1];
        }
        sq_dist[place] = found;
        location[place] = row;
    }

private:
    // Whether it stands before what is at a place; where there is nothing (-1), everything does.
    bool before(float found, std::int64_t row, int place) const {
        return found < sq_dist[place] ||
               (found == sq_dist[place] && static_cast<std::uint64_t>(row) < static_cast<std::uint64_t>(location[place]));
    }
};

// Of a thread: asking the system for memory takes as long as searching in it.
struct Scratch {
    std::vector<float> minima, limit, least;
    std::vector<std::int32_t> best;
    std::vector<std::uint16_t> done;

    template <typename T>
    static T* of(std::vector<T>& memory, std::size_t size) {
        if (memory.size() < size) memory.resize(size);
        return memory.data();
    }
};

Scratch& scratch() {
    static thread_local Scratch own;
    return own;
}

// Queries in one block, group by group, so that a group's rows are decoded once for all that look at them.
class Search {
public:
    Search(const QueryPack& queries, const Vectors& xq, const RowPack& rows, const Vectors& xb, float margin, const float* minima)
        : queries_(queries),
          rows_(rows),
          xq_(xq),
          xb_(xb),
          margin_(margin),
          minima_(minima),
          panels_(queries.panels),
          filled_((rows.count + kGroup - 1) / kGroup),
          d_(xq.d),
          padded_((xq.d + 15) / 16 * 16),
          rounding_(rows.packing->rounding),
          vanishing_(static_cast<float>(d_) * std::numeric_limits<float>::min()),
          limit_(Scratch::of(scratch().limit, static_cast<std::size_t>(panels_) * kPanel)),
          done_(Scratch::of(scratch().done, static_cast<std::size_t>(panels_) * rows.groups)),
          asked_(panels_),
          group_(static_cast<std::size_t>(kGroup) * padded_),
          query_(padded_) {
        std::fill_n(done_, static_cast<std::size_t>(panels_) * rows.groups, std::uint16_t{0});
    }

    SPADE_AVX2 Effort run(const float* bound, int k, float* sq_dist, std::int64_t* location) {
        nearest_.resize(queries_.count);
        evaluated_.assign(queries_.count, 0);
        for (int i = 0; i < panels_ * kPanel; ++i) limit_[i] = -kInfinity;
        for (int i = 0; i < queries_.count; ++i) {
            const std::size_t at = static_cast<std::size_t>(i) * k;
            nearest_[i] = {sq_dist + at, location + at, k, bound[i]};
            if (!(bound[i] >= 0)) continue;
            limit_[i] = key_of(i, bound[i]);
            asked_[i / kPanel] |= static_cast<std::uint16_t>(1u << i % kPanel);
        }
        if (std::any_of(limit_, limit_ + queries_.count, [](float limit) { return limit == kInfinity; })) look_at_best(k);
        for (int group = 0; group < filled_; ++group) {
            for (int panel = 0; panel < panels_; ++panel)
                for (unsigned which = within(group, panel) & ~done_[at(group, panel)]; which; which &= which - 1)
                    look(group, panel * kPanel + __builtin_ctz(which));
        }
        Effort effort;
        for (int i = 0; i < queries_.count; ++i) {
            effort.evaluated += evaluated_[i];
            effort.dense += evaluated_[i] * kDenseShare >= rows_.count && evaluated_[i] > kGroup * (k / kGroup + 2);
        }
        return effort;
    }

private:
    std::size_t at(int group, int panel) const { return static_cast<std::size_t>(group) * panels_ + panel; }
    const float* minima(int group, int panel) const { return minima_ + at(group, panel) * kPanel; }

    // The filter's value that a squared distance stands for, rounded up; an error of the filter comes on top.
    float key_of(int i, float sq_dist) const {
        const float norm = queries_.sq_norm[i];
        return (sq_dist * (1 + rounding_) - norm) / 2 + margin_ * rounding_ * norm + vanishing_;
    }

    // Which queries of a panel have a limit that a group's minimum is within, error and all. What is no number is.
    SPADE_AVX2 SPADE_INLINE unsigned within(int group, int panel) const {
        const float reach = rows_.group_reach[group];
        const __m256 of_reach = _mm256_set1_ps(margin_ * reach), of_residual = _mm256_set1_ps(margin_ * rows_.group_residual[group]);
        const __m256 of_rounding = _mm256_set1_ps(margin_ * rounding_ * reach * reach);
        const float* least = minima(group, panel);
        unsigned found = 0;
        for (int lane = 0; lane < kPanel; lane += 8) {
            const int i = panel * kPanel + lane;
            const __m256 left = _mm256_load_ps(queries_.residual.data() + i), norm = _mm256_load_ps(queries_.norm.data() + i);
            const __m256 error = _mm256_fmadd_ps(left, of_reach, _mm256_fmadd_ps(norm, of_residual, of_rounding));
            const __m256 most = _mm256_add_ps(_mm256_loadu_ps(limit_ + i), error);
            const __m256 near = _mm256_cmp_ps(_mm256_loadu_ps(least + lane), most, _CMP_NGT_UQ);
            found |= static_cast<unsigned>(_mm256_movemask_ps(near)) << lane;
        }
        return found & asked_[panel];
    }

    // The same for a query and each row of a group.
    SPADE_AVX2 SPADE_INLINE unsigned rows_within(int group, int i) const {
        const __m256 margin = _mm256_set1_ps(margin_), reach = _mm256_loadu_ps(rows_.reach.data() + group * kGroup);
        const __m256 residual = _mm256_loadu_ps(rows_.residual.data() + group * kGroup);
        const __m256 of_rounding = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(rounding_), reach), reach);
        const __m256 error = _mm256_fmadd_ps(_mm256_set1_ps(queries_.residual[i]), reach,
                                             _mm256_fmadd_ps(_mm256_set1_ps(queries_.norm[i]), residual, of_rounding));
        const __m256 most = _mm256_fmadd_ps(margin, error, _mm256_set1_ps(limit_[i]));
        return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(keys(group, i), most, _CMP_NGT_UQ)));
    }

    // Queries of which nothing is known yet look at their most promising rows first: that limits what else they look at.
    SPADE_AVX2 void look_at_best(int k) {
        const int queries = panels_ * kPanel;
        float* least = Scratch::of(scratch().least, queries);
        std::int32_t* best = Scratch::of(scratch().best, queries);
        std::fill_n(least, queries, kInfinity);
        std::fill_n(best, queries, 0);
        for (int group = 0; group < filled_; ++group)
            for (int i = 0; i < queries; i += 8) {
                const __m256 value = _mm256_loadu_ps(minima(group, 0) + i), before = _mm256_loadu_ps(least + i);
                const __m256 nearer = _mm256_cmp_ps(value, before, _CMP_LT_OQ);
                const __m256 of = _mm256_loadu_ps(reinterpret_cast<const float*>(best + i));
                const __m256 now = _mm256_blendv_ps(of, _mm256_castsi256_ps(_mm256_set1_epi32(group)), nearer);
                _mm256_storeu_ps(least + i, _mm256_blendv_ps(before, value, nearer));
                _mm256_storeu_ps(reinterpret_cast<float*>(best + i), now);
            }
        for (int i = 0; i < queries_.count; ++i) {
            if (limit_[i] != kInfinity) continue;
            if (k == 1) {
                look_at_row(best[i], i);
            } else {
                for (int group : most_promising(i, k)) {
                    look(group, i);
                    done_[at(group, i / kPanel)] |= static_cast<std::uint16_t>(1u << i % kPanel);
                }
            }
        }
    }

    // Evaluates the most promising row of a group.
    SPADE_AVX2 void look_at_row(int group, int i) {
        alignas(32) float values[kGroup];
        _mm256_store_ps(values, keys(group, i));
        const int count = std::min(kGroup, rows_.count - group * kGroup);
        const int r = static_cast<int>(std::min_element(values, values + count) - values);
        decode(xb_.row(group * kGroup + r), xb_.type, d_, padded_, group_.data() + static_cast<std::size_t>(r) * padded_);
        decoded_ = -1;
        evaluate(r, r, group, i);
    }

    // As many groups as hold k rows, and one more.
    std::vector<int> most_promising(int i, int k) const {
        const int count = std::min(filled_, k / kGroup + 2);
        std::vector<int> order(filled_);
        for (int group = 0; group < filled_; ++group) order[group] = group;
        const auto nearer = [&](int a, int b) {
            const float key_a = minima(a, i / kPanel)[i % kPanel], key_b = minima(b, i / kPanel)[i % kPanel];
            return key_a < key_b || (key_a == key_b && a < b);
        };
        std::partial_sort(order.begin(), order.begin() + count, order.end(), nearer);
        order.resize(count);
        return order;
    }

    // The filter's values of a group's rows for a query, one by one.
    SPADE_AVX2 SPADE_INLINE __m256 keys(int group, int i) const {
        const int stride = rows_.stride;
        const std::uint8_t* x = rows_.codes.data() + static_cast<std::size_t>(group) * kGroup * stride;
        const std::int16_t* q = queries_.lines.data() + static_cast<std::size_t>(i) * stride;
        __m256i dots[kGroup];
        for (int r = 0; r < kGroup; ++r) dots[r] = _mm256_setzero_si256();
        for (int c = 0; c < stride; c += 16) {
            const __m256i of_query = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + c));
#pragma GCC unroll 8
            for (int r = 0; r < kGroup; ++r) {
                const auto* row = reinterpret_cast<const __m128i*>(x + static_cast<std::size_t>(r) * stride + c);
                dots[r] = _mm256_add_epi32(dots[r], _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(row)), of_query));
            }
        }
        const __m256i dot = _mm256_add_epi32(sums(dots), _mm256_set1_epi32(queries_.start[i]));
        const __m256 of_step = _mm256_mul_ps(_mm256_cvtepi32_ps(dot), _mm256_loadu_ps(rows_.step.data() + group * kGroup));
        return _mm256_fnmadd_ps(of_step, _mm256_set1_ps(queries_.step[i]), _mm256_loadu_ps(rows_.half.data() + group * kGroup));
    }

    // Evaluates those of a group's rows that are within a query's limit.
    SPADE_AVX2 void look(int group, int i) {
        if (!nearest_[i].open(group * kGroup)) return;
        const int count = std::min(kGroup, rows_.count - group * kGroup);
        unsigned which = rows_within(group, i) & ((1u << count) - 1);
        if (nearest_[i].k == 1) which &= ~static_cast<unsigned>(rows_.repeats[group]);  // of equal rows the first counts
        if (which == 0) return;
        if (decoded_ != group) {
            for (int r = 0; r < count; ++r)
                decode(xb_.row(group * kGroup + r), xb_.type, d_, padded_, group_.data() + static_cast<std::size_t>(r) * padded_);
            decoded_ = group;
        }
        while (which) {  // two at a time: neither waits for the other's sums
            const int first = __builtin_ctz(which);
            which &= which - 1;
            const int second = which ? __builtin_ctz(which) : first;
            which &= which - 1;
            evaluate(first, second, group, i);
        }
    }

    // Evaluates two rows of the decoded group, or one twice.
    SPADE_AVX2 SPADE_INLINE void evaluate(int first, int second, int group, int i) {
        const float* const x[2] = {group_.data() + static_cast<std::size_t>(first) * padded_,
                                   group_.data() + static_cast<std::size_t>(second) * padded_};
        float found[2];
        direct<2>(query_of(i), x, padded_, found);
        nearest_[i].offer(found[0], static_cast<std::int64_t>(group) * kGroup + first);
        if (second != first) nearest_[i].offer(found[1], static_cast<std::int64_t>(group) * kGroup + second);
        evaluated_[i] += 1 + (second != first);
        limit_[i] = key_of(i, nearest_[i].limit());
    }

    // A query's channels, padded.
    SPADE_AVX2 SPADE_INLINE const float* query_of(int i) {
        const auto* q = static_cast<const float*>(xq_.row(i));
        if (d_ == padded_) return q;
        decode(q, Type::kFloat32, d_, padded_, query_.data());
        return query_.data();
    }

    const QueryPack& queries_;
    const RowPack& rows_;
    const Vectors xq_, xb_;
    const float margin_;
    const float* const minima_;
    const int panels_, filled_, d_, padded_;  // filled: groups that hold a row
    const float rounding_, vanishing_;
    float* const limit_;
    std::uint16_t* const done_;         // of each group and panel, the queries that need not look at it again
    std::vector<std::uint16_t> asked_;  // of each panel, the queries of which something is asked
    Buffer<float> group_, query_;       // decoded
    int decoded_ = -1;                  // which group is
    std::vector<Nearest> nearest_;
    std::vector<std::int32_t> evaluated_;
};

}  // namespace

SPADE_AVX2 float direct_sq_dist(const float* a, const void* b, Type type, int d) {
    const int padded = (d + 15) / 16 * 16;
    Buffer<float> q(padded), x(padded);
    decode(a, Type::kFloat32, d, padded, q.data());
    decode(b, type, d, padded, x.data());
    const float* const rows[1] = {x.data()};
    float found;
    direct<1>(q.data(), rows, padded, &found);
    return found;
}

const float* filter_all(const Unit& unit, const QueryPack& queries, const RowPack& rows) {
    float* minima = Scratch::of(scratch().minima, static_cast<std::size_t>(queries.panels) * rows.groups * kPanel);
    // As many groups as fill the cache, in even numbers: a tile holds two.
    const int chunk = std::max(2, unit.chunk_bytes / (rows.stride * kGroup) / 2 * 2);
    for (int group = 0; group < rows.groups; group += chunk)
        unit.filter(rows, {group, std::min(rows.groups, group + chunk)}, queries, minima);
    return minima;
}

Effort search(const Unit& unit, const QueryPack& queries, const Vectors& xq, const RowPack& rows, const Vectors& xb,
              const float* bound, int k, float margin, float* sq_dist, std::int64_t* location) {
    const UsualArithmetic usual;
    const std::size_t found = static_cast<std::size_t>(xq.count) * k;
    std::fill_n(sq_dist, found, kInfinity);
    std::fill_n(location, found, -1);
    const float* minima = filter_all(unit, queries, rows);
    return Search(queries, xq, rows, xb, margin, minima).run(bound, k, sq_dist, location);
}

}  // namespace spade
