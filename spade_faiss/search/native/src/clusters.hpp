// All vectors of a gallery in clusters: the nearest of all of them, without a look into clusters that are too far away.
//
// Let c be the center of a cluster and x one of its vectors. A query q that has met its k-th nearest vector at a distance b
// needs nothing of the cluster, or of a part of it, where, by the triangle inequality,
//
//     |q - c| - |x - c| > b    or    |x - c| - |q - c| > b
//
// Vectors are ordered by |x - c|, so that what is left is a range of them. It is filtered as a block is, but relative to c: the
// codes of q - c and x - c are finer than those of the vectors themselves, as they have less to cover, and rule out nearly all.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "gallery.hpp"
#include "simd_levels.hpp"

namespace spade {

// A cluster's vectors, the furthest from the center first.
struct ClusterPack {
    ClusterPack(std::shared_ptr<const Packing> packing, RowPack rows, std::vector<std::int64_t> ids);
    std::size_t nbytes() const { return rows.nbytes() + ids.size() * sizeof(std::int64_t) + 2 * groups * sizeof(float); }

    RowPack rows;
    std::vector<std::int64_t> ids;  // of each row
    int groups;                     // that hold a row
    std::vector<float> most_norm;   // of each group: an upper bound of |x - c| of its rows and all later ones
    std::vector<float> least_norm;  // of each group: a lower bound of |x - c| of its rows and all earlier ones
};

class Clusters {
public:
    // `centers`: (count, d) float32. For each vector of the gallery, `cluster` says which it belongs to, and `distance`,
    // rounded up, how far it is from the center. The gallery must outlive the clusters.
    Clusters(const SimdLevel& level, const Gallery& gallery, const Vectors& centers, const std::int32_t* cluster,
             const float* distance);

    int count() const { return static_cast<int>(packs_.size()); }
    int channels() const { return gallery_.d; }
    // Reads and packs the vectors of some clusters, which then stay in memory; the others are packed whenever they are
    // searched. Several threads may pack different clusters, but none that is searched at the time.
    void pack(int first, int last);
    std::size_t nbytes() const;

private:
    friend class ClusterSearch;
    std::shared_ptr<const Packing> packing(int cluster) const;
    std::unique_ptr<ClusterPack> make(int cluster) const;
    const float* center(int cluster) const { return centers_.data() + static_cast<std::size_t>(cluster) * padded_; }

    const SimdLevel& level_;
    const Gallery& gallery_;
    const int padded_;  // channels, padded for direct distances
    Buffer<float> centers_;
    RowPack packed_centers_;
    std::vector<std::int64_t> starts_, ids_;  // the vectors of all clusters, one after the other, and where each begins
    std::vector<float> reach_;                // of each cluster: an upper bound of |x - c|; -1 for none
    std::vector<float> most_reach_;           // of each group of centers
    std::vector<std::unique_ptr<ClusterPack>> packs_;
};

// Of each query, the image that it belongs to is `i / queries_per_image`; `excluded` (images, excluded_count) are images of the
// gallery that it must not be searched in, -1 for none.
struct ClusterQueries {
    Vectors xq;  // float32
    int per_image;
    const std::int64_t* excluded;
    int excluded_count;
};

// What a search did. A vector was looked at if its code was; `evaluated` ones were compared directly.
struct ClusterStats {
    std::vector<std::int64_t> looked_at;  // (images)
    std::int64_t evaluated = 0;
};

// Searches each query in the cluster whose center is nearest: what it finds bounds its distances. Writes sq_dist and id
// (queries, k), see `search`, ids in place of rows; and seed (queries), the cluster.
ClusterStats search_nearest_cluster(const Clusters& clusters, const ClusterQueries& queries, int k, float margin,
                                    float* sq_dist, std::int64_t* id, std::int32_t* seed);

// Searches each query in those clusters of a range that are not `seed` of the query and cannot be passed over. The range counts
// groups of kGroup clusters. bound (queries) are squared distances beyond which nothing is wanted.
ClusterStats search_clusters(const Clusters& clusters, GroupRange range, const ClusterQueries& queries, const float* bound,
                             const std::int32_t* seed, int k, float margin, float* sq_dist, std::int64_t* id);

}  // namespace spade
