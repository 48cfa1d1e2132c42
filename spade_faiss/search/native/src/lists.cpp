#include "lists.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "bounds.hpp"
#include "distance.hpp"
#include "nearest.hpp"
#include "target.hpp"

namespace spade {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Queries that search a list at a time: two panels, which the filters multiply side by side.
constexpr int kBatch = 2 * kPanel;
// Of so many more centroids than are wanted, those with the least estimates, distances are computed.
constexpr int kSpare = 16;
// So many lists are searched in any case; others only if their centroids are not much further than the nearest: at so many
// times its squared distance, at most.
constexpr int kLeastProbes = 4;
constexpr float kFurther = 1.5f;
// How many blocks of centroids there are, at the least, for each of those: the least of each bounds the estimates.
constexpr int kBlocksPerProbe = 4;
// What float32 may lose of an estimate, as a share of the squared lengths that it is made of; generously.
constexpr float kRounding = 1e-5f;
// Vectors that are asked for before they are needed.
constexpr int kAhead = 3;

struct Candidate {
    float estimate;
    std::int64_t id;
    bool operator<(const Candidate& other) const {
        return estimate < other.estimate || (estimate == other.estimate && id < other.id);
    }
};

// The centroids relative to their mean.
RowPack pack_centroids(const SimdLevel& level, const Vectors& centroids) {
    std::vector<float> mean(centroids.d);
    for (int i = 0; i < centroids.count; ++i)
        for (int c = 0; c < centroids.d; ++c)
            mean[c] += static_cast<const float*>(centroids.row(i))[c] / static_cast<float>(centroids.count);
    return {std::make_shared<const Packing>(level.format, centroids.d, mean.data(), nullptr, 0), centroids};
}

std::shared_ptr<const Packing> uncentered(const SimdLevel& level, int width) {
    const std::vector<float> zeros(width);
    // No fewer codes than rows have, which are padded to kRowAlign.
    const int alignment = round_up(level.format.alignment, kRowAlign);
    return std::make_shared<const Packing>(eight_bit_codes(alignment), width, zeros.data(), nullptr, 0);
}

}  // namespace

Lists::Lists(const SimdLevel& level, const Gallery& gallery, const Vectors& centroids, std::vector<ListCodes> groups)
    : level_(level),
      gallery_(gallery),
      width_(centroids.d),
      padded_(round_up(centroids.d, kDistanceAlign)),
      centroids_(static_cast<std::size_t>(centroids.count) * padded_),
      centroids_packed_(pack_centroids(level, centroids)),
      groups_(std::move(groups)) {
    for (int i = 0; i < centroids.count; ++i)
        decode(centroids.row(i), ElementType::kFloat32, nullptr, width_, padded_,
               centroids_.data() + static_cast<std::size_t>(i) * padded_);
}

// One search, of all queries.
class ListSearch {
public:
    ListSearch(const Lists& lists, const ListQueries& queries)
        : lists_(lists),
          queries_(queries),
          count_(queries.xq.count),
          padded_(lists.padded_),
          nprobe_(std::min(queries.nprobe, lists.count())),
          is_every_(nprobe_ == lists.count()),
          is_filtered_(lists.level_.format.max_row_code == eight_bit_codes(1).max_row_code),
          projected_(static_cast<std::size_t>(count_) * padded_),
          probed_(static_cast<std::size_t>(count_) * nprobe_, -1),
          candidates_(static_cast<std::size_t>(count_) * queries.rerank),
          found_(count_),
          packing_(uncentered(lists.level_, lists.width_)),
          batch_(packing_, kBatch),
          codes_(static_cast<std::size_t>(kBatch) * padded_),
          residuals_(static_cast<std::size_t>(kBatch) * padded_) {
        for (int i = 0; i < count_; ++i)
            decode(queries.projected.row(i), ElementType::kFloat32, nullptr, lists.width_, padded_, projected(i));
    }

    ListStats run(int k, float* sq_dist, std::int64_t* id) {
        choose_lists();
        // The nearest lists first: what is found there leaves less of the others to look at.
        scan_visits(0, 1);
        scan_visits(1, nprobe_);
        evaluate(k, sq_dist, id);
        return stats_;
    }

private:
    float* projected(int i) { return projected_.data() + static_cast<std::size_t>(i) * padded_; }
    const float* centroid(int list) const { return lists_.centroids_.data() + static_cast<std::size_t>(list) * padded_; }
    Candidate* candidates(int i) { return candidates_.data() + static_cast<std::size_t>(i) * queries_.rerank; }

    // The largest estimate that a row can have to become a candidate.
    float limit(int i) { return found_[i] < queries_.rerank ? kInfinity : candidates(i)->estimate; }

    // Finds the lists whose centroids are nearest, in the order of their distance: the nearest of those with the least
    // estimates, of which there are some more.
    SPADE_TARGET_AVX2 void choose_lists() {
        const RowPack& centroids = lists_.centroids_packed_;
        QueryPack pack(centroids.packing, kBatch);
        const int wanted = std::min(lists_.count(), kSpare + nprobe_), groups = centroids.groups;
        const int per_block = std::max(1, groups / (kBlocksPerProbe * wanted)), blocks = (groups + per_block - 1) / per_block;
        std::vector<float> minima(static_cast<std::size_t>(groups) * kBatch), least, sorted(blocks);
        std::vector<int> open[kBatch];
        std::vector<std::pair<float, int>> near;
        for (int first = 0; first < count_; first += kBatch) {
            const int count = std::min(kBatch, count_ - first);
            const void* addresses[kBatch];
            for (int j = 0; j < count; ++j) addresses[j] = projected(first + j);
            pack.assign(centroids.packing, addresses, ElementType::kFloat32, count);
            lists_.level_.filter(centroids, {0, groups}, pack, minima.data());
            const int width = pack.panels * kPanel;
            least_of_blocks(minima.data(), width, groups, per_block, least);
            float limits[kBatch];
            std::fill_n(limits, kBatch, -kInfinity);
            for (int j = 0; j < count; ++j) {
                open[j].clear();
                limits[j] = kInfinity;
                if (blocks < wanted) continue;
                for (int block = 0; block < blocks; ++block) sorted[block] = least[static_cast<std::size_t>(block) * width + j];
                std::nth_element(sorted.begin(), sorted.begin() + wanted - 1, sorted.end());
                limits[j] = sorted[wanted - 1];  // so many estimates, one of each block, are at most this
            }
            for (int group = 0; group < groups; ++group)
                for (int lane = 0; lane < width; lane += 8) {
                    const __m256 values = _mm256_loadu_ps(minima.data() + static_cast<std::size_t>(group) * width + lane);
                    const __m256 within = _mm256_cmp_ps(values, _mm256_loadu_ps(limits + lane), _CMP_LE_OQ);
                    for (auto which = static_cast<unsigned>(_mm256_movemask_ps(within)); which; which &= which - 1)
                        open[lane + __builtin_ctz(which)].push_back(group);
                }
            const Bounds bounds(pack, centroids, 1);
            for (int j = 0; j < count; ++j) {
                near_centroids(bounds, open[j], limits[j], j, first + j, near);
                const int chosen = std::min<int>(nprobe_, static_cast<int>(near.size()));
                std::partial_sort(near.begin(), near.begin() + chosen, near.end());
                int* const probed = probed_.data() + static_cast<std::size_t>(first + j) * nprobe_;
                for (int p = 0; p < chosen && (p < kLeastProbes || is_every_ || near[p].first <= kFurther * near[0].first); ++p)
                    probed[p] = near[p].second;
            }
        }
    }

    SPADE_TARGET_AVX2 static void least_of_blocks(const float* minima, int width, int groups, int per_block,
                                                  std::vector<float>& least) {
        const int blocks = (groups + per_block - 1) / per_block;
        least.assign(static_cast<std::size_t>(blocks) * width, kInfinity);
        for (int group = 0; group < groups; ++group) {
            float* of_block = least.data() + static_cast<std::size_t>(group / per_block) * width;
            for (int j = 0; j < width; j += 8, minima += 8)
                _mm256_storeu_ps(of_block + j, _mm256_min_ps(_mm256_loadu_ps(minima), _mm256_loadu_ps(of_block + j)));
        }
    }

    // Squared distances of query i, the j-th of its pack, to the centroids of some groups whose estimates are within a limit.
    SPADE_TARGET_AVX2 void near_centroids(const Bounds& bounds, const std::vector<int>& groups, float limit, int j, int i,
                                          std::vector<std::pair<float, int>>& near) {
        near.clear();
        for (int c = 0; c < lists_.width_; ++c)
            if (!std::isfinite(projected(i)[c])) return;
        for (const int group : groups) {
            const int rows = std::min(kGroup, lists_.count() - group * kGroup);
            if (rows <= 0) break;
            const __m256 within = _mm256_cmp_ps(bounds.estimates(group, j), _mm256_set1_ps(limit), _CMP_LE_OQ);
            for (unsigned which = static_cast<unsigned>(_mm256_movemask_ps(within)) & ((1u << rows) - 1); which;
                 which &= which - 1) {
                const int list = group * kGroup + __builtin_ctz(which);
                const float* const x[1] = {centroid(list)};
                float sq_dist;
                sq_distances<1>(projected(i), x, padded_, &sq_dist);
                near.emplace_back(sq_dist, list);
            }
        }
    }

    // Scans the lists that were chosen for each query, from the first-th nearest on, list by list.
    void scan_visits(int first, int last) {
        std::vector<int> begin(lists_.count() + 2, 0);  // two further: where the next query of a list is placed
        each_visit(first, last, [&](int list, int) { ++begin[list + 2]; });
        for (int list = 0; list < lists_.count(); ++list) begin[list + 2] += begin[list + 1];
        std::vector<int> visitors(begin.back());
        each_visit(first, last, [&](int list, int i) { visitors[begin[list + 1]++] = i; });
        for (int list = 0; list < lists_.count(); ++list)
            for (int at = begin[list]; at < begin[list + 1]; at += kBatch)
                scan(list, visitors.data() + at, std::min(kBatch, begin[list + 1] - at));
    }

    template <typename Visit>
    void each_visit(int first, int last, Visit visit) const {
        for (int i = 0; i < count_; ++i)
            for (int p = first; p < last; ++p)
                if (const int list = probed_[static_cast<std::size_t>(i) * nprobe_ + p]; list >= 0) visit(list, i);
    }

    // Scans a list for some queries.
    SPADE_TARGET_AVX2 void scan(int list, const int* queries, int count) {
        const void* addresses[kBatch];
        for (int j = 0; j < count; ++j) {
            float* const residual = residuals_.data() + static_cast<std::size_t>(j) * padded_;
            const float *p = projected(queries[j]), *c = centroid(list);
            for (int at = 0; at < padded_; at += 8)
                _mm256_store_ps(residual + at, _mm256_sub_ps(_mm256_load_ps(p + at), _mm256_load_ps(c + at)));
            addresses[j] = residual;
        }
        batch_.assign(packing_, addresses, ElementType::kFloat32, count);
        const int stride = round_up(lists_.width_, kRowAlign);
        for (int j = 0; j < count; ++j) {
            const std::int8_t* panel = batch_.codes.data() + static_cast<std::size_t>(j / kPanel) * kPanel * batch_.stride;
            for (int c = 0; c < stride; c += 4)
                std::copy_n(panel + (c * kPanel + j % kPanel * 4), 4, codes_.data() + static_cast<std::size_t>(j) * stride + c);
        }
        for (std::size_t number = 0; number < lists_.groups_.size(); ++number) scan(list, number, queries, count);
    }

    SPADE_TARGET_AVX2 void scan(int list, std::size_t number, const int* queries, int count) {
        const ListCodes& codes = lists_.groups_[number];
        const std::int64_t first = codes.starts[list], last = codes.starts[list + 1];
        if (first == last) return;
        GroupRange ranges[kBatch], all{static_cast<int>((last - first) / kGroup), 0};
        for (int j = 0; j < count; ++j) {
            ranges[j] = groups_within(codes.rows.half_sq_norm + first, static_cast<int>(last - first), j, queries[j]);
            if (ranges[j].begin == ranges[j].end) continue;
            all = {std::min(all.begin, ranges[j].begin), std::max(all.end, ranges[j].end)};
            stats_.looked_at += (ranges[j].end - ranges[j].begin) * kGroup;
        }
        if (all.begin >= all.end) return;
        const RowCodes rows{codes.rows.codes + first * codes.rows.stride, codes.rows.step + first,
                            codes.rows.half_sq_norm + first, codes.rows.stride};
        if (count == 1 || !is_filtered_) {
            for (int j = 0; j < count; ++j) take(number, rows, codes.id + first, ranges[j], j, queries[j]);
            return;
        }
        // An AMX tile holds two groups.
        all = {all.begin / 2 * 2, round_up(all.end, 2)};
        const int width = batch_.panels * kPanel;
        if (minima_.size() < static_cast<std::size_t>(all.end - all.begin) * width)
            minima_.resize(static_cast<std::size_t>(all.end - all.begin) * width);
        lists_.level_.filter(rows, all, batch_, minima_.data());
        float limits[kBatch];  // of the filter's minima
        std::fill_n(limits, kBatch, -kInfinity);
        for (int j = 0; j < count; ++j) limits[j] = limit(queries[j]);
        for (int group = all.begin; group < all.end; ++group)
            for (int panel = 0; panel < batch_.panels; ++panel) {
                const float* minima = minima_.data() + static_cast<std::size_t>(group - all.begin) * width + panel * kPanel;
                for (unsigned which = minima_within(minima, panel, limits); which; which &= which - 1) {
                    const int j = panel * kPanel + __builtin_ctz(which);
                    if (j >= count || group < ranges[j].begin || ranges[j].end <= group) continue;
                    take(number, rows, codes.id + first, {group, group + 1}, j, queries[j]);
                    limits[j] = limit(queries[j]);
                }
            }
    }

    // The groups of a list whose estimates may be small enough for query i, the j-th of the batch; {0, 0} for none.
    GroupRange groups_within(const float* half_sq_norm, int rows, int j, int i) {
        const float sq_norm = batch_.sq_norm[j], norm = batch_.norm[j];
        const float square = norm * norm - sq_norm + limit(i) + kRounding * (norm * norm + sq_norm);
        if (square == kInfinity) return {0, rows / kGroup};
        if (!(square >= 0)) return {0, 0};
        const float reach = std::sqrt(square), least = std::max(0.0f, norm - reach), most = norm + reach;
        const float* end = half_sq_norm + rows;
        const float* from = std::lower_bound(half_sq_norm, end, least * least * (1 - kRounding) / 2);
        const float* to = std::upper_bound(from, end, most * most * (1 + kRounding) / 2);
        if (from == to) return {0, 0};
        return {static_cast<int>(from - half_sq_norm) / kGroup, static_cast<int>(to - half_sq_norm + kGroup - 1) / kGroup};
    }

    // Which queries of a panel have a row in the group whose estimate is within their limit, as bits.
    SPADE_TARGET_AVX2 SPADE_INLINE unsigned minima_within(const float* minima, int panel, const float* limits) const {
        unsigned found = 0;
        for (int lane = 0; lane < kPanel; lane += 8) {
            const int j = panel * kPanel + lane;
            const __m256 least = _mm256_loadu_ps(minima + lane);
            const __m256 estimate = _mm256_add_ps(_mm256_add_ps(least, least), _mm256_load_ps(batch_.sq_norm.data() + j));
            const __m256 within = _mm256_cmp_ps(estimate, _mm256_loadu_ps(limits + j), _CMP_LE_OQ);
            found |= static_cast<unsigned>(_mm256_movemask_ps(within)) << lane;
        }
        return found;
    }

    // Takes the rows of some groups that query i, the j-th of the batch, may want.
    SPADE_TARGET_AVX2 void take(std::size_t number, const RowCodes& rows, const std::uint32_t* ids, GroupRange groups, int j,
                                int i) {
        const std::size_t size = static_cast<std::size_t>(groups.end - groups.begin) * kGroup;
        if (estimates_.size() < size) estimates_.resize(size);
        const QueryCodes query{codes_.data() + static_cast<std::size_t>(j) * rows.stride, batch_.initial_dot[j],
                               batch_.step[j]};
        lists_.level_.estimate_rows(rows, groups, query, estimates_.data());
        const __m256 sq_norm = _mm256_set1_ps(batch_.sq_norm[j]);
        for (int group = groups.begin; group < groups.end; ++group) {
            const __m256 half = _mm256_loadu_ps(estimates_.data() + static_cast<std::size_t>(group - groups.begin) * kGroup);
            const __m256 estimate = _mm256_add_ps(_mm256_add_ps(half, half), sq_norm);
            const __m256 within = _mm256_cmp_ps(estimate, _mm256_set1_ps(limit(i)), _CMP_LE_OQ);
            unsigned which = static_cast<unsigned>(_mm256_movemask_ps(within));
            if (!which) continue;
            alignas(32) float values[kGroup];
            _mm256_store_ps(values, estimate);
            for (; which; which &= which - 1) {
                const int r = __builtin_ctz(which);
                if (values[r] < kInfinity) offer(number, ids[group * kGroup + r], values[r], i);
            }
        }
    }

    void offer(std::size_t number, std::uint32_t id, float estimate, int i) {
        const ListCodes& codes = lists_.groups_[number];
        const auto locations = static_cast<std::uint32_t>(lists_.gallery_.locations);
        const std::uint32_t image = id / locations;
        if (image >= codes.images.size()) {
            stats_.is_damaged = true;
            return;
        }
        if (!queries_.allowed[number][image]) return;
        const Candidate candidate{estimate, codes.images[image] * locations + id % locations};
        Candidate* const heap = candidates(i);
        int& found = found_[i];
        if (found == queries_.rerank) {
            if (!(candidate < *heap)) return;
            std::pop_heap(heap, heap + found);
            --found;
        }
        heap[found++] = candidate;
        std::push_heap(heap, heap + found);
    }

    // Computes the distances of all candidates, which decide.
    SPADE_TARGET_AVX2 void evaluate(int k, float* sq_dist, std::int64_t* id) {
        const Gallery& gallery = lists_.gallery_;
        const int padded = round_up(gallery.d, kDistanceAlign);
        Buffer<float> q(padded), x(padded + 8);
        const float* const rows[1] = {x.data()};
        std::fill_n(sq_dist, static_cast<std::size_t>(count_) * k, kInfinity);
        std::fill_n(id, static_cast<std::size_t>(count_) * k, -1);
        for (int i = 0; i < count_; ++i, sq_dist += k, id += k) {
            const Candidate* found = candidates(i);
            decode(queries_.xq.row(i), ElementType::kFloat32, nullptr, gallery.d, padded, q.data());
            Nearest nearest{sq_dist, id, k, kInfinity};
            for (int at = 0; at < std::min(kAhead, found_[i]); ++at) gallery.prefetch(found[at].id);
            for (int at = 0; at < found_[i]; ++at) {
                if (at + kAhead < found_[i]) gallery.prefetch(found[at + kAhead].id);
                gallery.decode(found[at].id, padded, x.data());
                float distance;
                sq_distances<1>(q.data(), rows, padded, &distance);
                nearest.offer(distance, found[at].id);
            }
        }
    }

    const Lists& lists_;
    const ListQueries& queries_;
    const int count_, padded_, nprobe_;
    const bool is_every_;                // whether all lists are searched
    const bool is_filtered_;             // whether the SIMD level's filter multiplies codes that fill a byte
    Buffer<float> projected_;            // (queries, padded)
    std::vector<int> probed_;            // (queries, nprobe): the lists, the nearest first; -1 for none
    std::vector<Candidate> candidates_;  // (queries, rerank): of each query a heap, the largest first
    std::vector<int> found_;             // (queries): how many candidates there are
    std::shared_ptr<const Packing> packing_;
    QueryPack batch_;            // queries relative to the centroid of a list
    Buffer<std::int8_t> codes_;  // (kBatch, padded): their codes, query by query
    Buffer<float> residuals_;    // (kBatch, padded)
    std::vector<float> minima_, estimates_;
    ListStats stats_;
};

ListStats search_lists(const Lists& lists, const ListQueries& queries, int k, float* sq_dist, std::int64_t* id) {
    const ScopedDefaultFloatMode float_mode;
    return ListSearch(lists, queries).run(k, sq_dist, id);
}

}  // namespace spade
