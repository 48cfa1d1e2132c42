#include "windows.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "buffer.hpp"
#include "distance.hpp"
#include "floats.hpp"
#include "nearest.hpp"
#include "packs.hpp"
#include "target.hpp"

namespace spade {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Eight channels are computed with at a time, and eight vectors are compared at a time.
constexpr int kChannels = 8, kVectors = 8;
// A distance is made of four sums of eight lanes each: chunk c of the channels is added to sum c % 4, see `sq_distances`.
constexpr int kSums = 4;
// A sum of so many chunks is worth a look at what it says already.
constexpr int kWorthALook = 4;
// Where codes rule out less than so many of sixteen vectors, it is the same in so many images that follow, which are compared
// without them.
constexpr int kLeastRuledOut = 12, kImagesWithout = 8;

// How a vector is laid out here: in chunks of eight channels, those of one sum side by side, so that each sum is read in one
// go.
struct Layout {
    explicit Layout(int d) : chunks((d + kChannels - 1) / kChannels) {
        for (int sum = 0; sum < kSums; ++sum) begin[sum + 1] = begin[sum] + (chunks - sum + kSums - 1) / kSums;
    }
    std::size_t length() const { return static_cast<std::size_t>(chunks) * kChannels; }

    // Lays out a vector of float32 or float16 numbers; up to seven zeros follow them.
    SPADE_TARGET_AVX2 void arrange(const void* vector, ElementType type, int d, float* to) const {
        if (type == ElementType::kFloat16)
            arrange<ElementType::kFloat16>(static_cast<const char*>(vector), d, to);
        else
            arrange<ElementType::kFloat32>(static_cast<const char*>(vector), d, to);
    }

    template <ElementType Type>
    SPADE_TARGET_AVX2 SPADE_INLINE void arrange(const char* vector, int d, float* to) const {
        constexpr int bytes = kChannels * (Type == ElementType::kFloat16 ? 2 : 4);
        const int full = d / kChannels;
        int chunk = 0;
        for (int place = 0; chunk < full; place += kChannels)
            for (int sum = 0; sum < kSums && chunk < full; ++sum, ++chunk, vector += bytes)
                _mm256_store_ps(to + kChannels * begin[sum] + place, load<Type>(vector));
        if (chunk < chunks)
            decode(vector, Type, nullptr, d % kChannels, kChannels, to + kChannels * (begin[chunk % kSums] + chunk / kSums));
    }

    template <ElementType Type>
    static SPADE_TARGET_AVX2 SPADE_INLINE __m256 load(const char* numbers) {
        if (Type == ElementType::kFloat16) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers)));
        return _mm256_loadu_ps(reinterpret_cast<const float*>(numbers));
    }

    int chunks;
    int begin[kSums + 1] = {};  // the first chunk of each sum
};

// Adds the lanes of R registers up, each as `sum_of_lanes` does; what follows them in the result means nothing.
template <int R>
SPADE_TARGET_AVX2 SPADE_INLINE __m256 sums_of_lanes(__m256* eight) {
    if (R == 1) return _mm256_castps128_ps256(_mm_set_ss(sum_of_lanes(eight[0])));
    for (int r = R; r < kVectors; ++r) eight[r] = _mm256_setzero_ps();
    __m256 four[kVectors / 2];  // of vectors i and i + 4, one in each half
    for (int i = 0; i < kVectors / 2; ++i)
        four[i] = _mm256_add_ps(_mm256_permute2f128_ps(eight[i], eight[i + 4], 0x20),
                                _mm256_permute2f128_ps(eight[i], eight[i + 4], 0x31));
    __m256 two[2];
    for (int i = 0; i < 2; ++i)
        two[i] = _mm256_add_ps(_mm256_shuffle_ps(four[2 * i], four[2 * i + 1], 0x44),
                               _mm256_shuffle_ps(four[2 * i], four[2 * i + 1], 0xEE));
    return _mm256_add_ps(_mm256_shuffle_ps(two[0], two[1], 0x88), _mm256_shuffle_ps(two[0], two[1], 0xDD));
}

// A search of all queries in all images.
class WindowSearch {
public:
    WindowSearch(const Gallery& gallery, const SimdLevel& level, const WindowCoding& coding, const WindowQueries& queries,
                 int radius, const WindowHits& hits, float margin)
        : gallery_(gallery),
          screen_(level.screen_windows),
          queries_(queries),
          hits_(hits),
          margin_(margin),
          width_(coding.width),
          height_(coding.height),
          radius_(radius),
          window_{std::min(radius, height_ - 1), std::min(radius, width_ - 1)},
          window_bytes_(window_.bytes()),
          kept_(std::min(height_, 2 * window_.reach_y + 1)),
          layout_(gallery.d),
          plain_(layout_.length() + kChannels),
          xq_(layout_.length() * queries.images * queries.count()),
          map_(layout_.length() * kept_ * width_),
          query_codes_(coding, queries.images * queries.count()),
          wide_(queries.images),
          threshold_(width_),
          within_(static_cast<std::size_t>(width_) * window_bytes_),
          padded_query_(round_up(gallery.d, kDistanceAlign)),
          padded_row_(round_up(gallery.d, kDistanceAlign) + kChannels) {
        for (int image = 0; image < queries.images; ++image)
            for (int i = 0; i < queries.count(); ++i) {
                layout_.arrange(xq(image, i), ElementType::kFloat32, gallery.d, query(image, i));
                query_codes_.assign(image * queries.count() + i, xq(image, i));
                if (reach(image, queries.first + i) > radius) wide_[image].push_back(queries.first + i);
            }
    }

    SPADE_TARGET_AVX2 void run(int image, const WindowCodes& codes, const std::uint8_t* wanted) {
        first_id_ = static_cast<std::int64_t>(image) * gallery_.locations;
        own_ = codes.is_whole ? nullptr : &codes;
        const bool skips_codes = without_ > 0;
        without_ -= skips_codes;
        passed_ = compared_ = 0;
        std::vector<std::uint8_t> directly(wanted, wanted + queries_.images);
        for (int test = 0; test < queries_.images; ++test) {
            // A region of interest is searched by codes alone: without them, whole rows of a map are decoded.
            if (!wanted[test] || (coding().cells.empty() && (skips_codes || !has_met_others(test)))) continue;
            directly[test] = 0;
            search_by_codes(test, image, codes);
        }
        if (16 * passed_ > (16 - kLeastRuledOut) * compared_) without_ = kImagesWithout;
        compare_all(image, directly.data());
        for (int test = 0; test < queries_.images; ++test)
            if (wanted[test]) compare_wide(test, image);
    }

private:
    const WindowCoding& coding() const { return query_codes_.coding; }
    // The query as it is.
    const float* xq(int image, int i) const {
        return static_cast<const float*>(queries_.xq.row(image * gallery_.locations + queries_.first + i));
    }
    std::size_t place(int image, int i) const { return (static_cast<std::size_t>(image) * queries_.count() + i) * hits_.k; }

    // How many cells the window of a query reaches; below 0 where nothing is asked for.
    int reach(int test, int location) const {
        return queries_.reach ? queries_.reach[static_cast<std::size_t>(test) * gallery_.locations + location] : radius_;
    }
    // Whether the window of a query reaches as far as the radius.
    bool is_usual(int test, int location) const { return 0 <= reach(test, location) && reach(test, location) <= radius_; }
    // Whether the image that is searched has a vector at a cell.
    bool has_vector(int y, int x) const { return !own_ || own_->is_inside(y, x); }

    // Whether a test image was searched in another image before, and most of its queries met something there; if not, codes
    // could rule nothing out.
    bool has_met_others(int test) const {
        if (!queries_.reach) return hits_.sq_dist[place(test, 0)] < kInfinity;
        int asked = 0, met = 0;
        for (int i = 0; i < queries_.count(); ++i)
            if (is_usual(test, queries_.first + i)) {
                ++asked;
                met += hits_.sq_dist[place(test, i)] < kInfinity;
            }
        return 2 * met >= asked;
    }

    // The end of the line that begins at a query, see `WindowCoding`; what does not reach as far as the radius ends it.
    int line_end(int test, int first) const {
        const int last = coding().line_end(first, queries_.last);
        int end = first + 1;
        while (end < last && (!queries_.reach || is_usual(test, end))) ++end;
        return end;
    }

    // Compares the queries of a test image with the vectors of their windows that codes do not rule out.
    SPADE_TARGET_AVX2 void search_by_codes(int test, int image, const WindowCodes& codes) {
        const std::size_t length = static_cast<std::size_t>(codes.quads) * kQuad;
        const WindowMap map = codes.map();
        for (int first = queries_.first, last; first < queries_.last; first = last) {
            if (!is_usual(test, first)) {
                last = first + 1;
                continue;
            }
            last = line_end(test, first);
            const int y = coding().cell_of(first) / width_, left = coding().cell_of(first) % width_;
            const int number = test * queries_.count() + first - queries_.first, count = last - first;
            query_codes_.thresholds(number, count, hits_.sq_dist + place(test, first - queries_.first) + hits_.k - 1, hits_.k,
                                    codes, margin_, threshold_.data());
            screen_(map, {y, left, count, query_codes_.codes.data() + number * length, threshold_.data()}, window_,
                    within_.data());
            top_ = window_.top(y);
            const int rows = window_.bottom(y, height_) - top_ + 1;
            compared_ += static_cast<std::int64_t>(count) * rows * std::min(width_, 2 * window_.reach_x + 1);
            passing_.clear();
            for (int i = 0; i < count; ++i) {
                const std::size_t before = passing_.size();
                list_passing(first + i, left + i, image, map, rows, within_.data() + i * window_bytes_);
                if (passing_.size() > before) prefetch_query(xq(test, first + i - queries_.first));
            }
            compare_passing(test, image);
        }
    }

    // Lists the cells that passed, and has the processor fetch their vectors.
    SPADE_INLINE void list_passing(int location, int x, int image, const WindowMap& map, int rows, const std::uint8_t* within) {
        for (int begin = 0; begin < window_bytes_; begin += 8) {
            std::uint64_t eight;
            std::memcpy(&eight, within + begin, 8);
            for (; eight; eight &= eight - 1) {
                const int bit = __builtin_ctzll(eight), unit = begin + bit / kCells;
                const int u = window_.at(x, unit / rows, map).begin + bit % kCells;
                const int found = coding().location_of((top_ + unit % rows) * width_ + u);
                passing_.push_back({location, found});
                gallery_.prefetch(static_cast<std::int64_t>(image) * gallery_.locations + found);
            }
        }
    }

    SPADE_TARGET_AVX2 void compare_passing(int test, int image) {
        passed_ += static_cast<std::int64_t>(passing_.size());
        const int padded = round_up(gallery_.d, kDistanceAlign);
        int last = -1;
        for (const Pair& pair : passing_) {
            const int i = pair.location - queries_.first;
            if (pair.location != last) copy_query(xq(test, i));
            last = pair.location;
            gallery_.decode(static_cast<std::int64_t>(image) * gallery_.locations + pair.found, padded, padded_row_.data());
            const float* const x[1] = {padded_row_.data()};
            float found;
            sq_distances<1>(padded_query_.data(), x, padded, &found);
            const std::size_t at = place(test, i);
            Nearest{hits_.sq_dist + at, hits_.id + at, hits_.k, kInfinity}.offer(found, first_id_ + pair.found);
        }
    }

    void prefetch_query(const float* query) const {
        constexpr int line = 64 / sizeof(float);
        for (int c = 0; c < gallery_.d; c += line) _mm_prefetch(query + c, _MM_HINT_T0);
    }

    // Zeros follow what is copied, as it is always of one length.
    SPADE_TARGET_AVX2 SPADE_INLINE void copy_query(const float* query) {
        int c = 0;
        for (; c + kChannels <= gallery_.d; c += kChannels)
            _mm256_store_ps(padded_query_.data() + c, _mm256_loadu_ps(query + c));
        for (; c < gallery_.d; ++c) padded_query_[c] = query[c];
    }

    // Compares the queries of the wanted test images with all vectors of their windows.
    SPADE_TARGET_AVX2 void compare_all(int image, const std::uint8_t* wanted) {
        if (std::none_of(wanted, wanted + queries_.images, [](std::uint8_t is_wanted) { return is_wanted; })) return;
        int decoded = 0;  // up to this row of the map
        for (int y = queries_.first / width_; y * width_ < queries_.last; ++y) {
            const int first = std::max(queries_.first, y * width_), last = std::min(queries_.last, (y + 1) * width_);
            if (!is_any_usual(wanted, first, last)) continue;
            top_ = window_.top(y);
            bottom_ = window_.bottom(y, height_);
            for (decoded = std::max(decoded, top_); decoded <= bottom_; ++decoded) decode_map_row(image, decoded);
            for (int test = 0; test < queries_.images; ++test)
                for (int location = first; wanted[test] && location < last; ++location)
                    if (is_usual(test, location)) search(test, location);
        }
    }

    // Whether the window of any of these queries of the wanted test images reaches as far as the radius.
    bool is_any_usual(const std::uint8_t* wanted, int first, int last) const {
        for (int test = 0; test < queries_.images; ++test)
            for (int location = first; wanted[test] && location < last; ++location)
                if (is_usual(test, location)) return true;
        return false;
    }

    // Compares the queries of a test image whose windows reach further than the radius.
    SPADE_TARGET_AVX2 void compare_wide(int test, int image) {
        for (const int location : wide_[test]) {
            const int y = location / width_, x = location % width_, far = reach(test, location);
            const WindowShape window{std::min(far, height_ - 1), std::min(far, width_ - 1)};
            passing_.clear();
            for (int v = window.top(y); v <= window.bottom(y, height_); ++v)
                for (int u = window.left(x); u <= window.right(x, width_); ++u)
                    if (has_vector(v, u)) passing_.push_back({location, v * width_ + u});
            compare_passing(test, image);
        }
    }

    float* query(int image, int i) { return xq_.data() + layout_.length() * (image * queries_.count() + i); }

    // The vector of a cell of the map, whose row is decoded.
    float* vector(int y, int x) { return map_.data() + layout_.length() * (y % kept_ * width_ + x); }

    void decode_map_row(int image, int y) {
        const MapPart& part = gallery_.parts.front();
        // Numbers as they are stored.
        if (gallery_.parts.size() == 1 && part.rows.empty() && part.type != ElementType::kCodes) {
            const Vectors map{part.maps[image], part.type, gallery_.locations, gallery_.d};
            for (int x = 0; x < width_; ++x)
                if (has_vector(y, x)) layout_.arrange(map.row(y * width_ + x), part.type, gallery_.d, vector(y, x));
            return;
        }
        const int padded = static_cast<int>(layout_.length());
        for (int x = 0; x < width_; ++x) {
            if (!has_vector(y, x)) continue;
            gallery_.decode(static_cast<std::int64_t>(image) * gallery_.locations + y * width_ + x, padded, plain_.data());
            layout_.arrange(plain_.data(), ElementType::kFloat32, gallery_.d, vector(y, x));
        }
    }

    // Compares a query with its window.
    SPADE_TARGET_AVX2 void search(int image, int location) {
        const int i = location - queries_.first, x = location % width_;
        const std::size_t at = place(image, i);
        Nearest nearest{hits_.sq_dist + at, hits_.id + at, hits_.k, kInfinity};
        const float* const q = query(image, i);
        const int left = window_.left(x), right = window_.right(x, width_);
        const float* vectors[kVectors];
        int locations[kVectors], count = 0;
        for (int v = top_; v <= bottom_; ++v)
            for (int u = left; u <= right; ++u) {
                if (!has_vector(v, u)) continue;
                vectors[count] = vector(v, u);
                locations[count++] = v * width_ + u;
                if (count == kVectors) {
                    compare<kVectors>(q, vectors, locations, nearest);
                    count = 0;
                }
            }
        switch (count) {
            case 7:
                return compare<7>(q, vectors, locations, nearest);
            case 6:
                return compare<6>(q, vectors, locations, nearest);
            case 5:
                return compare<5>(q, vectors, locations, nearest);
            case 4:
                return compare<4>(q, vectors, locations, nearest);
            case 3:
                return compare<3>(q, vectors, locations, nearest);
            case 2:
                return compare<2>(q, vectors, locations, nearest);
            case 1:
                return compare<1>(q, vectors, locations, nearest);
        }
    }

    // Offers R vectors, unless a part of their sums is further than the nearest already: no sum becomes smaller by what is
    // added to it, rounded or not.
    template <int R>
    SPADE_TARGET_AVX2 SPADE_INLINE void compare(const float* q, const float* const* x, const int* locations,
                                                Nearest& nearest) const {
        const __m256 limit = _mm256_set1_ps(nearest.limit());
        __m256 even[kVectors], odd[kVectors], more[kVectors];
        add_chunks<R>(q, x, 0, even);
        if (layout_.begin[1] >= kWorthALook && !which_within<R>(sums_of_lanes<R>(even), limit)) return;
        add_chunks<R>(q, x, 2, more);
        for (int r = 0; r < R; ++r) even[r] = _mm256_add_ps(even[r], more[r]);
        if (layout_.begin[1] >= kWorthALook && !which_within<R>(sums_of_lanes<R>(even), limit)) return;
        add_chunks<R>(q, x, 1, odd);
        add_chunks<R>(q, x, 3, more);
        for (int r = 0; r < R; ++r) even[r] = _mm256_add_ps(even[r], _mm256_add_ps(odd[r], more[r]));
        const __m256 found = sums_of_lanes<R>(even);
        unsigned which = which_within<R>(found, limit);
        if (!which) return;
        alignas(32) float sq_dist[kVectors];
        _mm256_store_ps(sq_dist, found);
        for (; which; which &= which - 1) {
            const int r = __builtin_ctz(which);
            nearest.offer(sq_dist[r], first_id_ + locations[r]);
        }
    }

    // Computes one of the four sums of R vectors.
    template <int R>
    SPADE_TARGET_AVX2 SPADE_INLINE void add_chunks(const float* q, const float* const* x, int sum, __m256* sums) const {
        for (int r = 0; r < R; ++r) sums[r] = _mm256_setzero_ps();
        for (int c = kChannels * layout_.begin[sum]; c < kChannels * layout_.begin[sum + 1]; c += kChannels) {
            const __m256 query = _mm256_load_ps(q + c);
            for (int r = 0; r < R; ++r) {
                const __m256 difference = _mm256_sub_ps(query, _mm256_load_ps(x[r] + c));
                sums[r] = _mm256_fmadd_ps(difference, difference, sums[r]);
            }
        }
    }

    // Which of R squared distances are not beyond the limit, as bits.
    template <int R>
    static SPADE_TARGET_AVX2 SPADE_INLINE unsigned which_within(__m256 sq_dist, __m256 limit) {
        return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(sq_dist, limit, _CMP_LE_OQ))) & ((1u << R) - 1);
    }

    // The locations of a query, and of a vector that is compared with it.
    struct Pair {
        int location, found;
    };

    const Gallery& gallery_;
    const ScreenWindows screen_;
    const WindowQueries& queries_;
    const WindowHits& hits_;
    const float margin_;
    const int width_, height_, radius_;
    const WindowShape window_;
    const int window_bytes_;
    const int kept_;  // how many rows of a map are decoded at a time
    const Layout layout_;
    Buffer<float> plain_;  // a vector that is put together, before it is laid out
    Buffer<float> xq_;     // (images, queries, length)
    Buffer<float> map_;    // (kept, width, length): row y of the map is at y % kept
    WindowQueryCodes query_codes_;
    std::vector<std::vector<int>> wide_;       // of each test image, the queries whose windows reach further than the radius
    Buffer<std::int32_t> threshold_;           // (width): of the queries of a row
    Buffer<std::uint8_t> within_;              // (width, bytes of a window)
    Buffer<float> padded_query_, padded_row_;  // vectors as `sq_distances` reads them
    std::vector<Pair> passing_;
    std::int64_t passed_ = 0, compared_ = 0;  // of the image that is searched: vectors that codes left, of how many
    int without_ = 0;                         // images to come that are compared without codes
    int top_ = 0, bottom_ = 0;
    std::int64_t first_id_ = 0;         // of the image that is searched
    const WindowCodes* own_ = nullptr;  // its codes, if it has a region of interest of its own
};

}  // namespace

void search_windows(const Gallery& gallery, const std::int64_t* images, std::int64_t count, const SimdLevel& level,
                    const WindowCoding& coding, const WindowCodes* const* codes, const std::uint8_t* wanted,
                    const WindowQueries& queries, int radius, const WindowHits& hits, float margin) {
    const ScopedDefaultFloatMode float_mode;
    WindowSearch search(gallery, level, coding, queries, radius, hits, margin);
    for (std::int64_t i = 0; i < count; ++i) search.run(static_cast<int>(images[i]), *codes[i], wanted + i * queries.images);
}

}  // namespace spade
