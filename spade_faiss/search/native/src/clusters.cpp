#include "clusters.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "bounds.hpp"
#include "distance.hpp"
#include "nearest.hpp"
#include "target.hpp"

namespace spade {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Squares of smaller numbers are finite.
constexpr float kLargest = 1.8e19f;
// Queries that are searched in a cluster at a time: two panels, which the filters multiply side by side.
constexpr int kBatch = 2 * kPanel;

// So few queries are filtered one by one, in less time than a panel that is mostly empty.
constexpr int kFew = 2;

// Bounds of lengths that are computed in float32: sums of squares are rounded, and small squares vanish.
struct Lengths {
    explicit Lengths(const Packing& packing)
        : rounding(packing.rounding), vanishing(std::sqrt(static_cast<float>(packing.d)) * kVanishing) {}
    float upper(float length) const { return length * (1 + 2 * rounding) + 2 * vanishing; }
    // A sum of squares beyond float32 is infinite, the length is not.
    float lower(float length) const { return std::min(length, kLargest) * (1 - 2 * rounding) - 2 * vanishing; }
    // A lower bound of a length that `upper_bound` of packs.cpp has rounded up.
    float lower_of_upper(float length) const { return length * (1 - 4 * rounding) - 4 * vanishing; }
    float rounding, vanishing;
};

// A query that a cluster cannot be passed over for, bounds of how far it is from the center, and the groups that it looks at.
struct Asking {
    int query;
    float least, most;
    GroupRange groups;
};

}  // namespace

ClusterPack::ClusterPack(std::shared_ptr<const Packing> packing, RowPack rows_, std::vector<std::int64_t> ids_)
    : rows(std::move(rows_)),
      ids(std::move(ids_)),
      groups((rows.count + kGroup - 1) / kGroup),
      most_norm(groups),
      least_norm(groups) {
    const Lengths lengths(*packing);
    float least = kInfinity, most = 0;
    for (int group = 0; group < groups; ++group) {
        for (int i = group * kGroup; i < std::min(rows.count, (group + 1) * kGroup); ++i)
            // A vector that is no number has an infinite upper bound, and no lower one.
            least = std::min(least, std::isfinite(rows.norm[i]) ? lengths.lower_of_upper(rows.norm[i]) : 0.0f);
        least_norm[group] = least;
    }
    for (int group = groups - 1; group >= 0; --group) most_norm[group] = most = std::max(most, rows.max_norm[group]);
}

namespace {

// The centers, packed relative to their mean.
RowPack pack_centers(const SimdLevel& level, const Vectors& centers) {
    std::vector<float> mean(centers.d);
    for (int i = 0; i < centers.count; ++i)
        for (int c = 0; c < centers.d; ++c)
            mean[c] += static_cast<const float*>(centers.row(i))[c] / static_cast<float>(centers.count);
    return {std::make_shared<const Packing>(level.format, centers.d, mean.data(), nullptr, 0), centers};
}

}  // namespace

Clusters::Clusters(const SimdLevel& level, const Gallery& gallery, const Vectors& centers, const std::int32_t* cluster,
                   const float* distance)
    : level_(level),
      gallery_(gallery),
      padded_(round_up(gallery.d, kDistanceAlign)),
      centers_(static_cast<std::size_t>(centers.count) * padded_),
      packed_centers_(pack_centers(level, centers)),
      starts_(centers.count + 1),
      ids_(gallery.count),
      reach_(static_cast<std::size_t>(packed_centers_.groups) * kGroup, -1),
      most_reach_(packed_centers_.groups, -1),
      packs_(centers.count) {
    for (int c = 0; c < centers.count; ++c)
        decode(centers.row(c), ElementType::kFloat32, nullptr, centers.d, padded_,
               centers_.data() + static_cast<std::size_t>(c) * padded_);
    for (std::int64_t id = 0; id < gallery.count; ++id) {
        const int c = cluster[id];
        ++starts_[c + 1];
        // A distance that is no number is further than any.
        const float reach = distance[id] >= 0 ? distance[id] : kInfinity;
        reach_[c] = std::max(reach_[c], reach);
        most_reach_[c / kGroup] = std::max(most_reach_[c / kGroup], reach);
    }
    std::partial_sum(starts_.begin(), starts_.end(), starts_.begin());
    std::vector<std::int64_t> next(starts_.begin(), starts_.end() - 1);
    for (std::int64_t id = 0; id < gallery.count; ++id) ids_[next[cluster[id]]++] = id;
}

std::shared_ptr<const Packing> Clusters::packing(int cluster) const {
    return std::make_shared<const Packing>(level_.format, gallery_.d, center(cluster), nullptr, 0);
}

SPADE_TARGET_AVX2 std::unique_ptr<ClusterPack> Clusters::make(int cluster) const {
    const std::int64_t first = starts_[cluster];
    const int count = static_cast<int>(starts_[cluster + 1] - first);
    std::vector<float> distance(count);
    std::vector<int> order(count);
    Buffer<float> vectors(static_cast<std::size_t>(count) * padded_ + 8), sorted(static_cast<std::size_t>(count) * gallery_.d);
    for (int i = 0; i < count; ++i) {
        float* const x = vectors.data() + static_cast<std::size_t>(i) * padded_;
        gallery_.decode(ids_[first + i], padded_, x);
        const float* const rows[1] = {x};
        sq_distances<1>(center(cluster), rows, padded_, &distance[i]);
        if (!(distance[i] >= 0)) distance[i] = kInfinity;
        order[i] = i;
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return distance[a] > distance[b]; });
    std::vector<std::int64_t> ids(count);
    for (int i = 0; i < count; ++i) {
        ids[i] = ids_[first + order[i]];
        std::copy_n(vectors.data() + static_cast<std::size_t>(order[i]) * padded_, gallery_.d,
                    sorted.data() + static_cast<std::size_t>(i) * gallery_.d);
    }
    const auto packing = this->packing(cluster);
    RowPack rows(packing, {sorted.data(), ElementType::kFloat32, count, gallery_.d});
    return std::make_unique<ClusterPack>(packing, std::move(rows), std::move(ids));
}

void Clusters::pack(int first, int last) {
    const ScopedDefaultFloatMode float_mode;
    for (int cluster = first; cluster < last; ++cluster) packs_[cluster] = make(cluster);
}

std::size_t Clusters::nbytes() const {
    std::size_t total = centers_.nbytes() + packed_centers_.nbytes() + (starts_.size() + ids_.size()) * sizeof(std::int64_t);
    for (const auto& pack : packs_)
        if (pack) total += pack->nbytes();
    return total;
}

// One search, of all queries in some clusters.
class ClusterSearch {
public:
    ClusterSearch(const Clusters& clusters, const ClusterQueries& queries, int k, float margin, float* sq_dist,
                  std::int64_t* id)
        : clusters_(clusters),
          queries_(queries),
          count_(queries.xq.count),
          padded_(clusters.padded_),
          k_(k),
          margin_(margin),
          lengths_(*clusters.packed_centers_.packing),
          pack_(clusters.packed_centers_.packing, queries.xq),
          center_bounds_(pack_, clusters.packed_centers_, margin),
          xq_(static_cast<std::size_t>(count_) * padded_),
          reach_(static_cast<std::size_t>(pack_.panels) * kPanel, -kInfinity),
          decoded_(0),
          batch_(clusters.packed_centers_.packing, kBatch) {
        for (int i = 0; i < count_; ++i) {
            decode(queries.xq.row(i), ElementType::kFloat32, nullptr, queries.xq.d, padded_,
                   xq_.data() + static_cast<std::size_t>(i) * padded_);
            const std::size_t first = static_cast<std::size_t>(i) * k;
            nearest_.push_back({sq_dist + first, id + first, k, kInfinity});
        }
        std::fill_n(sq_dist, static_cast<std::size_t>(count_) * k, kInfinity);
        std::fill_n(id, static_cast<std::size_t>(count_) * k, -1);
        stats_.looked_at.resize((count_ + queries.per_image - 1) / queries.per_image);
    }

    SPADE_TARGET_AVX2 ClusterStats run_nearest(std::int32_t* seed) {
        std::vector<float> least(reach_.size(), kInfinity);
        std::vector<std::int32_t> least_group(reach_.size());
        for_center_groups({0, clusters_.packed_centers_.groups}, [&](int group, const float* minima) SPADE_TARGET_AVX2 {
            for (int i = 0; i < count_; ++i)
                if (minima[i] < least[i]) {
                    least[i] = minima[i];
                    least_group[i] = group;
                }
        });
        std::vector<std::pair<std::int32_t, int>> order;
        for (int i = 0; i < count_; ++i) {
            float nearest = kInfinity;
            seed[i] = least_group[i] * kGroup;
            for (int c = least_group[i] * kGroup; c < std::min(clusters_.count(), (least_group[i] + 1) * kGroup); ++c) {
                const float found = sq_distance_to_center(i, c);
                if (clusters_.reach_[c] >= 0 && found < nearest) {
                    nearest = found;
                    seed[i] = c;
                }
            }
            order.emplace_back(seed[i], i);
        }
        std::sort(order.begin(), order.end());
        std::vector<Asking> asking;
        for (std::size_t at = 0; at < order.size(); ++at) {
            asking.push_back(ask(order[at].second, order[at].first));
            set_reach(order[at].second);
            if (at + 1 < order.size() && order[at + 1].first == order[at].first) continue;
            search(order[at].first, asking);
            asking.clear();
        }
        return std::move(stats_);
    }

    SPADE_TARGET_AVX2 ClusterStats run(GroupRange range, const float* bound, const std::int32_t* seed) {
        for (int i = 0; i < count_; ++i) {
            nearest_[i].bound = bound[i];
            if (bound[i] >= 0) set_reach(i);
        }
        std::vector<Asking> asking[kGroup];
        for_center_groups(range, [&](int group, const float* minima) SPADE_TARGET_AVX2 {
            if (clusters_.most_reach_[group] < 0) return;
            for (int panel = 0; panel < pack_.panels; ++panel)
                for (unsigned which = queries_near(group, panel, minima + panel * kPanel); which; which &= which - 1) {
                    const int query = panel * kPanel + __builtin_ctz(which);
                    if (query >= count_) break;
                    for (unsigned near = clusters_near(group, query); near; near &= near - 1) {
                        const int r = __builtin_ctz(near), cluster = group * kGroup + r;
                        if (cluster == seed[query]) continue;
                        const Asking asked = ask(query, cluster);
                        if (!is_passed_over(asked.least, clusters_.reach_[cluster], reach_[query])) asking[r].push_back(asked);
                    }
                }
            for (int r = 0; r < kGroup; ++r) {
                if (!asking[r].empty()) search(group * kGroup + r, asking[r]);
                asking[r].clear();
            }
        });
        return std::move(stats_);
    }

private:
    // Filters the centers of some groups, as many at a time as stay in the cache, and visits each group with its minima.
    template <typename Visit>
    void for_center_groups(GroupRange range, Visit visit) {
        const RowPack& centers = clusters_.packed_centers_;
        const std::size_t size = static_cast<std::size_t>(pack_.panels) * kPanel;
        const int chunk = std::max(2, clusters_.level_.chunk_bytes / (centers.stride * kGroup) / 2 * 2);
        std::vector<float> minima(static_cast<std::size_t>(chunk) * size);
        for (int first = range.begin; first < range.end; first += chunk) {
            const int last = std::min(range.end, first + chunk);
            clusters_.level_.filter(centers, {first, last}, pack_, minima.data());
            for (int group = first; group < last; ++group) visit(group, minima.data() + (group - first) * size);
        }
    }

    // Whether vectors at up to `reach` from a center can be passed over by a query that is at least `least` from it.
    bool is_passed_over(float least, float reach, float bound) const { return least - margin_ * reach > bound; }

    // The estimate of |q - c| = reach of the query + reach of the cluster, rounded up, and the filter's error apart.
    SPADE_TARGET_AVX2 SPADE_INLINE __m256 center_thresholds(__m256 query_reach, __m256 cluster_reach, __m256 sq_norm) const {
        const __m256 far = _mm256_fmadd_ps(_mm256_set1_ps(margin_), cluster_reach, query_reach);
        const float rounding = lengths_.rounding;
        const __m256 sq_dist = _mm256_mul_ps(_mm256_mul_ps(far, far), _mm256_set1_ps(1 + 4 * rounding));
        const __m256 half = _mm256_mul_ps(_mm256_sub_ps(sq_dist, sq_norm), _mm256_set1_ps(0.5f));
        const __m256 vanishing = _mm256_set1_ps(lengths_.vanishing * lengths_.vanishing);
        return _mm256_add_ps(half, _mm256_fmadd_ps(_mm256_set1_ps(rounding), sq_norm, vanishing));
    }

    // Which queries of a panel may need one of a group's clusters, as bits. `minima` are those of the panel.
    SPADE_TARGET_AVX2 SPADE_INLINE unsigned queries_near(int group, int panel, const float* minima) const {
        const __m256 cluster_reach = _mm256_set1_ps(clusters_.most_reach_[group]);
        float thresholds[kPanel];
        unsigned wanted = 0;
        for (int lane = 0; lane < kPanel; lane += 8) {
            const __m256 reach = _mm256_loadu_ps(reach_.data() + panel * kPanel + lane);
            const __m256 sq_norm = _mm256_load_ps(pack_.sq_norm.data() + panel * kPanel + lane);
            _mm256_storeu_ps(thresholds + lane, center_thresholds(reach, cluster_reach, sq_norm));
            const __m256 is_wanted = _mm256_cmp_ps(reach, _mm256_setzero_ps(), _CMP_NLT_UQ);
            wanted |= static_cast<unsigned>(_mm256_movemask_ps(is_wanted)) << lane;
        }
        return center_bounds_.queries_within(group, panel, minima, thresholds) & wanted;
    }

    // Which of a group's clusters a query may need, as bits.
    SPADE_TARGET_AVX2 SPADE_INLINE unsigned clusters_near(int group, int i) const {
        const __m256 reach = _mm256_loadu_ps(clusters_.reach_.data() + group * kGroup);
        const __m256 thresholds = center_thresholds(_mm256_set1_ps(reach_[i]), reach, _mm256_set1_ps(pack_.sq_norm[i]));
        const unsigned filled =
            static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(reach, _mm256_setzero_ps(), _CMP_GE_OQ)));
        return center_bounds_.rows_within(group, i, thresholds) & filled;
    }

    SPADE_TARGET_AVX2 SPADE_INLINE float sq_distance_to_center(int i, int cluster) const {
        const float* const rows[1] = {clusters_.center(cluster)};
        float found;
        sq_distances<1>(query(i), rows, padded_, &found);
        return found;
    }

    SPADE_TARGET_AVX2 SPADE_INLINE Asking ask(int i, int cluster) const {
        const float length = std::sqrt(sq_distance_to_center(i, cluster));
        return {i, lengths_.lower(length), lengths_.upper(length), {0, 0}};
    }

    // How far a vector may be from query i, to be found.
    void set_reach(int i) { reach_[i] = lengths_.upper(std::sqrt(nearest_[i].limit())); }

    // Searches the queries in a cluster.
    SPADE_TARGET_AVX2 void search(int cluster, std::vector<Asking>& asking) {
        std::unique_ptr<ClusterPack> temporary;
        const ClusterPack* pack = clusters_.packs_[cluster].get();
        if (pack == nullptr) {
            temporary = clusters_.make(cluster);
            pack = temporary.get();
        }
        if (decoded_.nbytes() < (static_cast<std::size_t>(pack->rows.count) * padded_ + 8) * sizeof(float))
            decoded_ = Buffer<float>(static_cast<std::size_t>(pack->rows.count) * padded_ + 8);
        is_decoded_.assign(pack->rows.count, false);
        // Queries that look at as many groups are searched together: a counting sort, for there are many queries.
        starts_.assign(pack->groups + 2, 0);
        for (Asking& asked : asking) {
            asked.groups = groups_for(*pack, asked);
            ++starts_[asked.groups.end + 1];
        }
        std::partial_sum(starts_.begin(), starts_.end(), starts_.begin());
        const int none = starts_[1];  // those that look at no group
        sorted_.resize(asking.size());
        for (const Asking& asked : asking) sorted_[starts_[asked.groups.end]++] = asked;
        for (std::size_t first = none; first < sorted_.size(); first += kBatch)
            search_batch(*pack, sorted_.data() + first,
                         static_cast<int>(std::min<std::size_t>(kBatch, sorted_.size() - first)));
    }

    // The groups of a cluster that a query cannot pass over; {0, 0} for none.
    GroupRange groups_for(const ClusterPack& pack, const Asking& asked) const {
        const float bound = reach_[asked.query];
        const auto needs_outer = [&](float most_norm) { return !is_passed_over(asked.least, most_norm, bound); };
        const auto needs_no_inner = [&](float least_norm) { return least_norm * margin_ - asked.most > bound; };
        const auto end = std::partition_point(pack.most_norm.begin(), pack.most_norm.end(), needs_outer);
        const auto begin = std::partition_point(pack.least_norm.begin(), pack.least_norm.end(), needs_no_inner);
        const GroupRange range{static_cast<int>(begin - pack.least_norm.begin()),
                               static_cast<int>(end - pack.most_norm.begin())};
        return range.begin < range.end ? range : GroupRange{0, 0};
    }

    SPADE_TARGET_AVX2 void search_batch(const ClusterPack& pack, const Asking* asking, int count) {
        GroupRange all = asking[0].groups;
        const void* addresses[kBatch];
        for (int j = 0; j < count; ++j) {
            const GroupRange range = asking[j].groups;
            all = {std::min(all.begin, range.begin), std::max(all.end, range.end)};
            addresses[j] = query(asking[j].query);
            const int rows = std::min(pack.rows.count, range.end * kGroup) - range.begin * kGroup;
            stats_.looked_at[asking[j].query / queries_.per_image] += rows;
        }
        // An AMX tile holds two groups.
        all = {all.begin / 2 * 2, std::min(pack.rows.groups, round_up(all.end, 2))};
        batch_.assign(pack.rows.packing, addresses, ElementType::kFloat32, count);
        const int width = batch_.panels * kPanel;
        if (minima_.size() < static_cast<std::size_t>(all.end - all.begin) * width)
            minima_.resize(static_cast<std::size_t>(all.end - all.begin) * width);
        const Bounds bounds(batch_, pack.rows, margin_);
        if (count <= kFew)
            estimate_few(bounds, all, count);
        else
            clusters_.level_.filter(pack.rows, all, batch_, minima_.data());
        std::fill_n(thresholds_, kBatch, -kInfinity);
        int promising[kBatch];
        std::fill_n(promising, kBatch, -1);
        for (int j = 0; j < count; ++j) {
            thresholds_[j] = bounds.threshold(j, nearest_[asking[j].query].limit());
            if (thresholds_[j] != kInfinity) continue;
            // Nothing bounds the query yet: the most promising rows do.
            float least = kInfinity;
            promising[j] = asking[j].groups.begin;
            for (int group = asking[j].groups.begin; group < asking[j].groups.end; ++group)
                if (const float minimum = minima_[static_cast<std::size_t>(group - all.begin) * width + j]; minimum < least) {
                    least = minimum;
                    promising[j] = group;
                }
            refine(pack, bounds, promising[j], j, asking[j].query);
        }
        for (int group = all.begin; group < all.end; ++group)
            for (int panel = 0; panel < batch_.panels; ++panel) {
                const float* minima = minima_.data() + static_cast<std::size_t>(group - all.begin) * width + panel * kPanel;
                for (unsigned which = bounds.queries_within(group, panel, minima, thresholds_ + panel * kPanel); which;
                     which &= which - 1) {
                    const int j = panel * kPanel + __builtin_ctz(which);
                    if (j < count && group != promising[j] && asking[j].groups.begin <= group && group < asking[j].groups.end)
                        refine(pack, bounds, group, j, asking[j].query);
                }
            }
        for (int j = 0; j < count; ++j) set_reach(asking[j].query);
    }

    // What the filter does, query by query.
    SPADE_TARGET_AVX2 void estimate_few(const Bounds& bounds, GroupRange range, int count) {
        float* minima = minima_.data();
        for (int group = range.begin; group < range.end; ++group, minima += kPanel)
            for (int j = 0; j < count; ++j) {
                alignas(32) float values[kGroup];
                _mm256_store_ps(values, bounds.estimates(group, j));
                minima[j] = *std::min_element(values, values + kGroup);
            }
    }

    // Evaluates the rows of a group that query i, the j-th of the batch, cannot rule out.
    SPADE_TARGET_AVX2 void refine(const ClusterPack& pack, const Bounds& bounds, int group, int j, int i) {
        const int count = std::min(kGroup, pack.rows.count - group * kGroup);
        if (count <= 0) return;
        unsigned which = bounds.rows_within(group, j, _mm256_set1_ps(thresholds_[j])) & ((1u << count) - 1);
        // Of equal rows the first one counts, unless it is excluded.
        if (k_ == 1 && queries_.excluded_count == 0) which &= ~static_cast<unsigned>(pack.rows.repeats[group]);
        for (; which; which &= which - 1) {
            const int row = group * kGroup + __builtin_ctz(which);
            if (is_excluded(i, pack.ids[row])) continue;
            float* const x = decoded_.data() + static_cast<std::size_t>(row) * padded_;
            if (!is_decoded_[row]) {
                clusters_.gallery_.decode(pack.ids[row], padded_, x);
                is_decoded_[row] = true;
            }
            const float* const rows[1] = {x};
            float found;
            sq_distances<1>(query(i), rows, padded_, &found);
            nearest_[i].offer(found, pack.ids[row]);
            ++stats_.evaluated;
        }
        thresholds_[j] = bounds.threshold(j, nearest_[i].limit());
    }

    bool is_excluded(int i, std::int64_t id) const {
        const std::int64_t image = id / clusters_.gallery_.locations;
        const std::int64_t* first =
            queries_.excluded + static_cast<std::size_t>(i / queries_.per_image) * queries_.excluded_count;
        return std::find(first, first + queries_.excluded_count, image) != first + queries_.excluded_count;
    }

    const float* query(int i) const { return xq_.data() + static_cast<std::size_t>(i) * padded_; }

    const Clusters& clusters_;
    const ClusterQueries& queries_;
    const int count_, padded_, k_;
    const float margin_;
    const Lengths lengths_;
    const QueryPack pack_;        // of all queries, relative to the mean of the centers
    const Bounds center_bounds_;  // of the centers
    Buffer<float> xq_;            // (queries, padded)
    std::vector<float> reach_;    // (padded queries): how far a vector may be, to be found; -infinity where none is wanted
    Buffer<float> decoded_;       // (rows of the cluster, padded)
    std::vector<bool> is_decoded_;
    QueryPack batch_;      // relative to the center of a cluster
    int members_[kBatch];  // the queries of the batch
    float thresholds_[kBatch];
    std::vector<float> minima_;
    std::vector<Asking> sorted_;
    std::vector<int> starts_;
    std::vector<Nearest> nearest_;
    ClusterStats stats_;
};

ClusterStats search_nearest_cluster(const Clusters& clusters, const ClusterQueries& queries, int k, float margin,
                                    float* sq_dist, std::int64_t* id, std::int32_t* seed) {
    const ScopedDefaultFloatMode float_mode;
    return ClusterSearch(clusters, queries, k, margin, sq_dist, id).run_nearest(seed);
}

ClusterStats search_clusters(const Clusters& clusters, GroupRange range, const ClusterQueries& queries, const float* bound,
                             const std::int32_t* seed, int k, float margin, float* sq_dist, std::int64_t* id) {
    const ScopedDefaultFloatMode float_mode;
    return ClusterSearch(clusters, queries, k, margin, sq_dist, id).run(range, bound, seed);
}

}  // namespace spade
