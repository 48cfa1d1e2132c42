#include "k_center.hpp"

#include <atomic>
#include <cmath>
#include <thread>
#include <utility>

#include "buffer.hpp"
#include "distance.hpp"
#include "floats.hpp"
#include "target.hpp"

namespace spade {
namespace {

// A vector whose nearest pick is at distance r is at least d - r from a pick at distance d from that one: where d is twice r,
// it cannot be nearer. Squared, and with room for what rounding does to the three distances.
constexpr float kTwiceAsFar = 4.001f;
// What rounding does to squared distances, at most.
constexpr float kRounded = 1.0001f;

// The vectors whose nearest pick is one and the same.
struct Cluster {
    std::vector<int> ids;
    std::vector<float> sq_dist;  // of each to the pick
    float furthest = -1;         // the largest of them, and the smallest id that has it
    int furthest_id = -1;

    void add(int id, float distance) {
        ids.push_back(id);
        sq_dist.push_back(distance);
        note(id, distance);
    }

    void note(int id, float distance) {
        if (distance > furthest || (distance == furthest && id < furthest_id)) {
            furthest = distance;
            furthest_id = id;
        }
    }
};

class Picker {
public:
    SPADE_TARGET_AVX2 Picker(const Vectors& xb, const float* shadows, float slack)
        : padded_(round_up(xb.d, kDistanceAlign)), x_(xb.count * padded_), shadows_(shadows), slack_(slack) {
        for (int i = 0; i < xb.count; ++i)
            decode(xb.row(i), xb.type, xb.codes, xb.d, static_cast<int>(padded_), x_.data() + i * padded_);
    }

    SPADE_TARGET_AVX2 float sq_distance(int a, int b) const {
        const float* const rows[1] = {x_.data() + b * padded_};
        float found;
        sq_distances<1>(x_.data() + a * padded_, rows, static_cast<int>(padded_), &found);
        return found;
    }

    // Whether a vector may be nearer to the pick than this, as far as their shadows tell.
    SPADE_TARGET_AVX2 SPADE_INLINE bool may_be_nearer(int pick, int id, float sq_dist) const {
        const float *a = shadows_ + static_cast<std::size_t>(pick) * kShadow,
                    *b = shadows_ + static_cast<std::size_t>(id) * kShadow;
        const __m256 first = _mm256_sub_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b));
        const __m256 second = _mm256_sub_ps(_mm256_loadu_ps(a + 8), _mm256_loadu_ps(b + 8));
        const float apart = sum_of_lanes(_mm256_fmadd_ps(first, first, _mm256_mul_ps(second, second)));
        const float limit = std::sqrt(sq_dist) + slack_;
        return apart <= kRounded * limit * limit;
    }

    // Moves the vectors of a cluster that are nearer to the new pick.
    SPADE_TARGET_AVX2 void divide(Cluster& from, int pick, float apart, Cluster& to) const {
        std::size_t left = 0;
        from.furthest = -1;
        for (std::size_t i = 0; i < from.ids.size(); ++i) {
            const int id = from.ids[i];
            const float before = from.sq_dist[i];
            if (apart < kTwiceAsFar * before && may_be_nearer(pick, id, before)) {
                const float distance = sq_distance(pick, id);
                if (distance < before) {
                    to.add(id, distance);
                    continue;
                }
            }
            from.ids[left] = id;
            from.sq_dist[left++] = before;
            from.note(id, before);
        }
        from.ids.resize(left);
        from.sq_dist.resize(left);
    }

private:
    std::size_t padded_;
    Buffer<float> x_;
    const float* shadows_;
    float slack_;
};

}  // namespace

SPADE_TARGET_AVX2 KCenter k_center(const Vectors& xb, int count, int first, const float* shadows, float slack, int threads) {
    const ScopedDefaultFloatMode float_mode;
    const Picker picker(xb, shadows, slack);
    KCenter found{{first}, 0};
    std::vector<Cluster> clusters(1);
    for (int id = 0; id < xb.count; ++id) clusters[0].add(id, picker.sq_distance(first, id));
    for (;;) {
        Cluster furthest;
        for (const Cluster& cluster : clusters)
            if (cluster.furthest_id >= 0) furthest.note(cluster.furthest_id, cluster.furthest);
        found.sq_radius = furthest.furthest;
        if (static_cast<int>(found.picks.size()) == count || furthest.furthest <= 0) return found;
        const int pick = furthest.furthest_id;
        std::vector<Cluster> made(threads);
        std::atomic<std::size_t> next{0};
        const auto divide = [&](Cluster* to) {
            const ScopedDefaultFloatMode of_thread;
            for (std::size_t j; (j = next++) < clusters.size();) {
                const float apart = picker.sq_distance(pick, static_cast<int>(found.picks[j]));
                if (apart < kTwiceAsFar * clusters[j].furthest) picker.divide(clusters[j], pick, apart, *to);
            }
        };
        std::vector<std::thread> helpers;
        for (int t = 1; t < threads; ++t) helpers.emplace_back(divide, &made[t]);
        divide(&made[0]);
        for (std::thread& helper : helpers) helper.join();
        for (int t = 1; t < threads; ++t)
            for (std::size_t i = 0; i < made[t].ids.size(); ++i) made[0].add(made[t].ids[i], made[t].sq_dist[i]);
        found.picks.push_back(pick);
        clusters.push_back(std::move(made[0]));
    }
}

}  // namespace spade
