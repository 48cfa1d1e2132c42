// Checks each SIMD level that this processor runs: its filter and its screen must equal the reference bit by bit, and its
// searches must equal brute force in double precision.
//
// The program prints what differs and exits with 1, or prints how many cases were checked. tests/search/test_native.py builds
// it with sanitizers. Linked statically, it also runs on an emulated processor.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "bounds.hpp"
#include "clusters.hpp"
#include "distance.hpp"
#include "search.hpp"
#include "windows.hpp"

using namespace spade;

namespace {

std::mt19937 rng(1);
int failures = 0;

void fail(const SimdLevel& level, const char* what, int nq, int nb, int d) {
    std::printf("%s: %s (%d queries, %d rows, %d channels)\n", level.name, what, nq, nb, d);
    ++failures;
}

// Rounds a finite number towards 0; what is too small for a normal float16 becomes 0.
std::uint16_t to_float16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
    if (exponent <= 0) return 0;
    return static_cast<std::uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023));
}

float from_float16(std::uint16_t bits) {
    const float value =
        std::ldexp(static_cast<float>(bits & 1023) + (bits >> 10 & 31 ? 1024.0f : 0.0f), (bits >> 10 & 31) - 25);
    return bits & 0x8000 ? -value : value;
}

struct TestVectors {
    std::vector<char> memory;
    Vectors vectors;
    std::vector<float> values;
    std::shared_ptr<StoredCodes> codes;
};

// How vectors are stored: as numbers, as codes of a byte each, or as packed ones.
enum class Stored { kFloat16, kFloat32, kBytes, kPacked };
constexpr Stored kAllStored[] = {Stored::kFloat16, Stored::kFloat32, Stored::kBytes, Stored::kPacked};

// Makes vectors around a few centers, so that some are near, some equal and some far; they begin at an odd address.
TestVectors make_vectors(int count, int d, Stored stored, float scale, const std::vector<float>& centers) {
    std::normal_distribution<float> normal;
    std::uniform_int_distribution<int> pick(0, 3), kind(0, 9);
    TestVectors set;
    set.values.resize(static_cast<std::size_t>(count) * d);
    const bool packed = stored == Stored::kPacked;
    std::vector<float> steps;
    std::vector<std::uint8_t> bits;
    for (int c = 0; c < d; ++c) {
        steps.push_back(scale * (packed ? 0.5f : 0.02f) * (1 + 0.5f * static_cast<float>(c % 3)));
        bits.push_back(static_cast<std::uint8_t>(1 + (5 * c + d) % kMostCodeBits));
    }
    const bool coded = packed || stored == Stored::kBytes;
    if (coded) set.codes = std::make_shared<StoredCodes>(d, steps.data(), packed ? bits.data() : nullptr);
    const ElementType type = coded                        ? ElementType::kCodes
                             : stored == Stored::kFloat16 ? ElementType::kFloat16
                                                          : ElementType::kFloat32;
    const std::size_t row_bytes = bytes_of(type, set.codes.get(), d);
    set.memory.resize(count * row_bytes + 1);
    for (int i = 0; i < count; ++i) {
        const int center = pick(rng), what = kind(rng);
        const float spread = what == 0 ? 0.0f : what == 1 ? 3.0f : what == 2 ? 1e-4f : 0.2f;
        char* row = set.memory.data() + 1 + i * row_bytes;
        for (int c = 0, bit = 0; c < d; bit += bits[c++]) {
            float value = scale * (centers[static_cast<std::size_t>(center) * d + c] + spread * normal(rng));
            if (stored == Stored::kFloat16) {
                const std::uint16_t float16 = to_float16(value);
                value = from_float16(float16);
                std::memcpy(row + 2 * c, &float16, 2);
            } else if (stored == Stored::kBytes) {
                const float code = std::min(127.0f, std::max(-128.0f, std::nearbyint(value / steps[c])));
                row[c] = static_cast<char>(static_cast<std::int8_t>(code));
                value = code * steps[c];
            } else if (packed) {
                const int most = (1 << bits[c]) - 1;
                const int u = std::min(most, std::max(0, static_cast<int>((value / steps[c] + most) / 2)));
                for (int b = 0; b < bits[c]; ++b) row[(bit + b) / 8] |= static_cast<char>((u >> b & 1) << (bit + b) % 8);
                value = static_cast<float>(2 * u - most) * steps[c];
            } else {
                std::memcpy(row + 4 * c, &value, 4);
            }
            set.values[static_cast<std::size_t>(i) * d + c] = value;
        }
    }
    set.vectors = {set.memory.data() + 1, type, count, d, set.codes.get()};
    return set;
}

double exact_sq_distance(const float* a, const float* b, int d) {
    double total = 0;
    for (int c = 0; c < d; ++c) total += (static_cast<double>(a[c]) - b[c]) * (static_cast<double>(a[c]) - b[c]);
    return total;
}

// Makes orthonormal rows by the Gram-Schmidt process, applied twice.
std::vector<float> make_basis(int components, int d) {
    std::normal_distribution<double> normal;
    std::vector<std::vector<double>> rows;
    std::vector<float> basis;
    for (int j = 0; j < components; ++j) {
        std::vector<double> row(d);
        for (double& value : row) value = normal(rng);
        for (int pass = 0; pass < 2; ++pass)
            for (const auto& other : rows) {
                double along = 0;
                for (int c = 0; c < d; ++c) along += other[c] * row[c];
                for (int c = 0; c < d; ++c) row[c] -= along * other[c];
            }
        double sq_norm = 0;
        for (double value : row) sq_norm += value * value;
        for (double& value : row) value /= std::sqrt(sq_norm);
        for (double value : row) basis.push_back(static_cast<float>(value));
        rows.push_back(row);
    }
    return basis;
}

// The minima of packs with digits must bound those of the same codes without them from below, and closely.
void check_digits(const SimdLevel& level, const QueryPack& queries, const RowPack& rows, const std::vector<float>& minima) {
    const Packing& packing = *rows.packing;
    for (int query = 0; query < queries.count; ++query) {
        const auto* q =
            queries.codes.data() + static_cast<std::size_t>(query / kPanel) * kPanel * queries.stride + query % kPanel * 4;
        for (int group = 0; group * kGroup < rows.count; ++group) {
            double least = std::numeric_limits<double>::infinity(), size = 0;
            bool is_cut = (group + 1) * kGroup > rows.count;  // padding is 0, with the largest digits
            for (int row = group * kGroup; row < std::min(rows.count, (group + 1) * kGroup); ++row) {
                const auto* x = rows.codes.data() + static_cast<std::size_t>(row) * rows.stride;
                double dot = 0;
                for (int c = 0; c < packing.length(); ++c)
                    dot += static_cast<double>(x[c] - packing.format.row_offset) * q[c / 4 * 4 * kPanel + c % 4];
                const double product = dot * rows.step[row] * queries.step[query];
                least = std::min(least, rows.half_sq_norm[row] - product);
                size = std::max(size, rows.half_sq_norm[row] + std::fabs(product));
                const double height = static_cast<double>(rows.half_sq_norm[row] - rows.least_half_sq_norm[group]) /
                                      (static_cast<double>(rows.group_step[group]) * packing.unit);
                is_cut |= !(height < packing.most_height());
            }
            const float found = minima[static_cast<std::size_t>(group) * queries.panels * kPanel + query];
            const bool has_digits = q[packing.length() / 4 * 4 * kPanel + packing.length() % 4] != 0;
            const double rounding = size * packing.rounding;
            if (found > least + rounding) fail(level, "digits are too large", queries.count, rows.count, packing.d);
            if (has_digits && !is_cut && found < least - rounding - 1.001 * rows.group_step[group] * packing.unit)
                fail(level, "digits are too small", queries.count, rows.count, packing.d);
        }
    }
}

// The estimates of single queries have the minima that the filter finds, bit by bit.
void check_estimates(const SimdLevel& level, const RowPack& rows, const QueryPack& queries, const std::vector<float>& minima,
                     int nq, int nb, int d) {
    std::vector<float> estimates(static_cast<std::size_t>(rows.groups) * kGroup);
    for (int i = 0; i < nq; ++i) {
        const std::int8_t* panel = queries.codes.data() + static_cast<std::size_t>(i / kPanel) * kPanel * queries.stride;
        std::vector<std::int8_t> codes;
        for (int c = 0; c < queries.stride; c += 4)
            codes.insert(codes.end(), panel + c * kPanel + i % kPanel * 4, panel + c * kPanel + i % kPanel * 4 + 4);
        const QueryCodes query{codes.data(), queries.initial_dot[i], queries.step[i]};
        level.estimate_rows(rows, {0, rows.groups}, query, estimates.data());
        for (int group = 0; group < rows.groups; ++group) {
            const float* of_group = estimates.data() + static_cast<std::size_t>(group) * kGroup;
            const float least = *std::min_element(of_group, of_group + kGroup);
            if (least != minima[static_cast<std::size_t>(group) * queries.panels * kPanel + i]) {
                fail(level, "estimates differ from the filter's minima", nq, nb, d);
                return;
            }
        }
    }
}

// The screen must equal the reference, and find what the minima are compared for.
SPADE_TARGET_AVX2 void check_screen(const SimdLevel& level, const QueryPack& queries, const RowPack& rows,
                                    const std::vector<float>& minima, float scale) {
    const int d = rows.packing->d;
    const Bounds bounds(queries, rows, 1);
    std::vector<float> thresholds(static_cast<std::size_t>(queries.panels) * kPanel, -std::numeric_limits<float>::infinity());
    for (int i = 0; i < queries.count; ++i)
        thresholds[i] = bounds.threshold(i, scale * scale * static_cast<float>(d) * static_cast<float>(i % 3) * 0.3f);
    const GroupRange all{0, rows.groups};
    std::vector<std::uint16_t> within(minima.size() / kPanel, 1), expected(within.size(), 2);
    level.screen(rows, all, queries, {thresholds.data(), 1}, within.data());
    screen_reference(rows, all, queries, {thresholds.data(), 1}, expected.data());
    if (within != expected) fail(level, "the screen differs from the reference", queries.count, rows.count, d);
    for (std::size_t at = 0; at < within.size(); ++at) {
        const int group = static_cast<int>(at) / queries.panels, panel = static_cast<int>(at) % queries.panels;
        if (bounds.queries_within(group, panel, minima.data() + at * kPanel, thresholds.data() + panel * kPanel) != within[at])
            fail(level, "the screen differs from the filter", queries.count, rows.count, d);
    }
}

// Rows whose codes are padded to 16 bytes alone, between others.
void check_narrow_rows(const SimdLevel& level, const RowPack& rows, const QueryPack& queries, const std::vector<float>& minima,
                       int nq, int nb, int d) {
    const int stride = round_up(rows.packing->length(), kRowAlign), count = rows.groups * kGroup;
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(count) * stride + 64, 255);
    for (int row = 0; row < count; ++row)
        std::memcpy(codes.data() + static_cast<std::size_t>(row) * stride,
                    rows.codes.data() + static_cast<std::size_t>(row) * rows.stride, stride);
    const RowCodes narrow{codes.data(), rows.step.data(), rows.half_sq_norm.data(), stride};
    std::vector<float> found(minima.size(), -3);
    level.filter(narrow, {0, rows.groups}, queries, found.data());
    if (std::memcmp(found.data(), minima.data(), minima.size() * sizeof(float)) != 0)
        fail(level, "the filter of narrow rows differs", nq, nb, d);
}

// What lists search: rows without digits whose codes are padded to 16, by packs of queries and by single ones.
void check_list_codes(const SimdLevel& level, const Vectors& x, const Vectors& q, const float* center, const float* basis,
                      int components) {
    const auto packing =
        std::make_shared<Packing>(eight_bit_codes(round_up(level.format.alignment, kRowAlign)), x.d, center, basis, components);
    const RowPack rows(packing, x);
    const QueryPack queries(packing, q);
    std::vector<float> minima(static_cast<std::size_t>(queries.panels) * rows.groups * kPanel, -1);
    filter_reference(rows, {0, rows.groups}, queries, minima.data());
    check_estimates(level, rows, queries, minima, q.count, x.count, x.d);
    // AMX reads beyond rows that have fewer codes than its tiles: whatever is there must not count.
    check_narrow_rows(level, rows, queries, minima, q.count, x.count, x.d);
}

// `longest`, times scale: the largest number of queries with digits; 0 for none.
void check(const SimdLevel& level, int nq, int nb, int d, int components, Stored type, float scale, int k, float longest) {
    std::normal_distribution<float> normal;
    std::vector<float> centers(static_cast<std::size_t>(4) * d), center(d);
    for (float& value : centers) value = 1 + normal(rng);
    for (float& value : center) value = scale;
    const TestVectors rows = make_vectors(nb, d, type, scale, centers);
    const TestVectors queries = make_vectors(nq, d, Stored::kFloat32, scale, centers);
    const Vectors xq{queries.values.data(), ElementType::kFloat32, nq, d};
    const std::vector<float> basis = make_basis(components, d);
    const float unit = longest * scale / static_cast<float>(level.format.max_query_code);
    const auto packing = std::make_shared<Packing>(level.format, d, center.data(), basis.data(), components, unit);
    const RowPack row_pack(packing, rows.vectors);
    const QueryPack query_pack(packing, queries.vectors);

    const GroupRange all{0, row_pack.groups};
    std::vector<float> minima(static_cast<std::size_t>(query_pack.panels) * row_pack.groups * kPanel, -1),
        expected(minima.size(), -2);
    level.filter(row_pack, all, query_pack, minima.data());
    filter_reference(row_pack, all, query_pack, expected.data());
    if (std::memcmp(minima.data(), expected.data(), minima.size() * sizeof(float)) != 0)
        fail(level, "the filter differs from the reference", nq, nb, d);
    if (packing->has_digits()) check_digits(level, query_pack, row_pack, minima);

    check_screen(level, query_pack, row_pack, minima, scale);

    if (level.format.max_row_code == eight_bit_codes(1).max_row_code)
        check_list_codes(level, rows.vectors, queries.vectors, center.data(), basis.data(), components);

    for (int round = 0; round < 2; ++round) {
        std::vector<float> bound(nq, std::numeric_limits<float>::infinity()), D(static_cast<std::size_t>(nq) * k);
        std::vector<std::int64_t> I(D.size());
        if (round == 1)
            for (float& value : bound) value = scale * scale * static_cast<float>(d) * 0.05f;
        search(level, query_pack, xq, row_pack, rows.vectors, bound.data(), k, 1, D.data(), I.data());
        for (int i = 0; i < nq; ++i) {
            const float* q = queries.values.data() + static_cast<std::size_t>(i) * d;
            std::vector<std::pair<float, std::int64_t>> best;
            for (int row = 0; row < nb; ++row) {
                const float found = sq_distance(q, rows.vectors.row(row), rows.vectors.type, rows.vectors.codes, d);
                const double truth = exact_sq_distance(q, rows.values.data() + static_cast<std::size_t>(row) * d, d);
                if (std::fabs(found - truth) > 1e-5 * truth + 1e-30) fail(level, "a direct distance is off", nq, nb, d);
                if (found <= bound[i]) best.emplace_back(found, row);
            }
            std::sort(best.begin(), best.end());
            best.resize(k, {std::numeric_limits<float>::infinity(), -1});
            for (int j = 0; j < k; ++j) {
                const std::size_t at = static_cast<std::size_t>(i) * k + j;
                if (D[at] != best[j].first || I[at] != best[j].second) {
                    fail(level, round ? "a bounded search is wrong" : "a search is wrong", nq, nb, d);
                    return;
                }
            }
        }
    }
}

// Clusters of any kind find the nearest of all rows; the gallery reads them from memory that ends where they do.
void check_clusters(const SimdLevel& level, int nq, int nb, int d, Stored type, int k, bool packed) {
    std::normal_distribution<float> normal;
    std::uniform_int_distribution<int> pick(0, nb / 8);
    std::vector<float> around(static_cast<std::size_t>(4) * d);
    for (float& value : around) value = 1 + normal(rng);
    const TestVectors rows = make_vectors(nb, d, type, 1, around);
    const TestVectors queries = make_vectors(nq, d, Stored::kFloat32, 1, around);
    const int count = nb / 8 + 1;
    const TestVectors centers = make_vectors(count, d, Stored::kFloat32, 1, around);
    Gallery gallery{d, 1, 1, nb, {MapPart{rows.vectors.type, d, 1, {}, {}, {}, rows.vectors.codes}}};
    std::vector<std::int32_t> cluster(nb);
    std::vector<float> distance(nb);
    for (int i = 0; i < nb; ++i) {
        gallery.parts[0].maps.push_back(rows.vectors.row(i));
        cluster[i] = pick(rng);
        const float* center = centers.values.data() + static_cast<std::size_t>(cluster[i]) * d;
        const double found = exact_sq_distance(center, rows.values.data() + static_cast<std::size_t>(i) * d, d);
        distance[i] = static_cast<float>(std::sqrt(found) * (1 + 1e-6));
    }
    Clusters clusters(level, gallery, {centers.values.data(), ElementType::kFloat32, count, d}, cluster.data(),
                      distance.data());
    if (packed) clusters.pack(0, count);
    const Vectors xq{queries.values.data(), ElementType::kFloat32, nq, d};
    const std::int64_t excluded[1] = {nb / 2};
    const ClusterQueries asked{xq, nq, excluded, 1};
    const std::size_t size = static_cast<std::size_t>(nq) * k;
    std::vector<float> D(size), more(size), bound(nq);
    std::vector<std::int64_t> I(size), ids(size);
    std::vector<std::int32_t> seed(nq);
    search_nearest_cluster(clusters, asked, k, 1, D.data(), I.data(), seed.data());
    for (int i = 0; i < nq; ++i) bound[i] = D[static_cast<std::size_t>(i + 1) * k - 1];
    const GroupRange all{0, round_up(count, kRowAlign) / kGroup};
    search_clusters(clusters, all, asked, bound.data(), seed.data(), k, 1, more.data(), ids.data());
    for (int i = 0; i < nq; ++i) {
        std::vector<std::pair<float, std::int64_t>> best, found;
        for (int row = 0; row < nb; ++row)
            if (row != excluded[0])
                best.emplace_back(sq_distance(queries.values.data() + static_cast<std::size_t>(i) * d, rows.vectors.row(row),
                                              rows.vectors.type, rows.vectors.codes, d),
                                  row);
        for (std::size_t j = static_cast<std::size_t>(i) * k; j < static_cast<std::size_t>(i + 1) * k; ++j) {
            if (I[j] >= 0) found.emplace_back(D[j], I[j]);
            if (ids[j] >= 0) found.emplace_back(more[j], ids[j]);
        }
        std::sort(best.begin(), best.end());
        std::sort(found.begin(), found.end());
        best.resize(std::min<std::size_t>(k, best.size()));
        found.resize(std::min<std::size_t>(k, found.size()));
        if (found != best) {
            fail(level, packed ? "a search of clusters is wrong" : "a search of clusters that are not kept is wrong", nq, nb,
                 d);
            return;
        }
    }
}

// Windows find the nearest of what they hold; the maps are read from memory that ends where they do. `own`: whether images have
// regions of interest of their own; then some windows reach further than the radius, and some queries are not asked.
void check_windows(const SimdLevel& level, int height, int width, int d, Stored type, int radius, int k, bool own) {
    const int locations = height * width, images = 3, tests = 2;
    std::normal_distribution<float> normal;
    std::vector<float> around(static_cast<std::size_t>(4) * d);
    for (float& value : around) value = 1 + normal(rng);
    Gallery gallery{d,
                    width,
                    locations,
                    static_cast<std::int64_t>(images) * locations,
                    {MapPart{ElementType::kFloat32, d, width, {}, {}, {}, nullptr}}};
    std::vector<TestVectors> maps;
    for (int image = 0; image < images; ++image) maps.push_back(make_vectors(locations, d, type, 1, around));
    for (const TestVectors& map : maps) gallery.parts[0].maps.push_back(map.vectors.row(0));
    gallery.parts[0].type = maps.back().vectors.type;
    gallery.parts[0].codes = maps.back().vectors.codes;  // all maps have the same
    const TestVectors queries = make_vectors(tests * locations, d, Stored::kFloat32, 1, around);
    const Vectors xq{queries.values.data(), ElementType::kFloat32, tests * locations, d};
    // Steps so fine that some vectors have no codes, and so coarse that all of them are alike.
    const float steps[] = {0.001f, 0.02f, 3.0f};
    const WindowCoding coding(d, around.data(), level.most_window_code, steps[(d + radius + k) % 3], height, width, {});
    std::uniform_int_distribution<int> chance(0, 2), further(-2, 3);
    std::vector<std::uint8_t> inside(static_cast<std::size_t>(images) * locations, 1);
    std::vector<std::int32_t> reach(static_cast<std::size_t>(tests) * locations, radius);
    if (own) {
        for (int i = 0; i < 2 * locations; ++i) inside[i] = chance(rng) == 0;  // one of the images is whole
        for (std::int32_t& far : reach) {
            const int more = further(rng);
            far = more == -2 ? -1 : radius + std::max(0, more);
        }
    }
    std::vector<WindowCodes> codes;
    std::vector<const WindowCodes*> of_images;
    for (int image = 0; image < images; ++image) {
        const std::unique_ptr<bool[]> of_image(new bool[locations]);  // of memory that ends where the map does
        for (int l = 0; l < locations; ++l) of_image[l] = inside[static_cast<std::size_t>(image) * locations + l];
        codes.emplace_back(coding, gallery, image, own ? of_image.get() : nullptr);
    }
    const std::int64_t order[images] = {2, 0, 1};
    for (std::int64_t image : order) of_images.push_back(&codes[image]);
    const std::uint8_t wanted[images * tests] = {1, 1, 1, 0, 0, 1};
    const int middle = (locations + 1) / 2;
    for (const auto& [first, last] : {std::pair{0, middle}, std::pair{middle, locations}}) {
        if (first == last) continue;
        const WindowQueries asked{xq, tests, first, last, own ? reach.data() : nullptr};
        const std::size_t size = static_cast<std::size_t>(tests) * asked.count() * k;
        std::vector<float> D(size, std::numeric_limits<float>::infinity());
        std::vector<std::int64_t> I(size, -1);
        search_windows(gallery, order, images, level, coding, of_images.data(), wanted, asked, radius, {k, D.data(), I.data()});
        for (int test = 0; test < tests; ++test)
            for (int at = first; at < last; ++at) {
                const float* q = queries.values.data() + static_cast<std::size_t>(test * locations + at) * d;
                const int far = reach[static_cast<std::size_t>(test) * locations + at];
                std::vector<std::pair<float, std::int64_t>> best;
                for (int image = 0; image < images; ++image)
                    for (int l = 0; wanted[image * tests + test] && l < locations; ++l)
                        if (std::abs(l / width - at / width) <= far && std::abs(l % width - at % width) <= far &&
                            inside[static_cast<std::size_t>(order[image]) * locations + l])
                            best.emplace_back(sq_distance(q, maps[order[image]].vectors.row(l), maps[image].vectors.type,
                                                          maps[image].vectors.codes, d),
                                              order[image] * locations + l);
                std::sort(best.begin(), best.end());
                best.resize(k, {std::numeric_limits<float>::infinity(), -1});
                for (int j = 0; j < k; ++j) {
                    const std::size_t place = (static_cast<std::size_t>(test) * asked.count() + at - first) * k + j;
                    if (D[place] != best[j].first || I[place] != best[j].second) {
                        fail(level, "a search of windows is wrong", tests * locations, images * locations, d);
                        return;
                    }
                }
            }
    }
}

}  // namespace

int main() {
    for (const SimdLevel& level : simd_levels()) {
        if (!level.why_not.empty()) {
            std::printf("%s: not here: %s\n", level.name, level.why_not.c_str());
            continue;
        }
        int checked = 0;
        for (int d : {1, 17, 40, 64, 130})
            for (int nb : {1, 5, 8, 17, 50})
                for (int nq : {1, 33})
                    for (int k : {1, 4})
                        for (Stored type : kAllStored) {
                            const float scale = type == Stored::kFloat32 && d % 2 ? 1e6f : 1.0f;
                            check(level, nq, nb, d, 0, type, scale, std::min(k, nb), 0), ++checked;
                            // Of most queries; of few; with the coarsest steps.
                            const float longest = checked % 3 == 0 ? 4.0f : checked % 3 == 1 ? 1.0f : 400.0f;
                            check(level, nq, nb, d, 0, type, scale, std::min(k, nb), longest), ++checked;
                            if (d > 3)
                                check(level, nq, nb, d, d / 4, type, scale, std::min(k, nb), k == 1 ? 0 : 4.0f), ++checked;
                        }
        for (int d : {1, 17, 40})
            for (int nb : {2, 50, 400})
                for (int nq : {1, 40})
                    for (int k : {1, 4})
                        for (bool packed : {false, true})
                            for (Stored type : kAllStored) check_clusters(level, nq, nb, d, type, k, packed), ++checked;
        for (int d : {1, 24, 40, 130})
            for (const auto& [height, width] : {std::pair{1, 1}, std::pair{5, 3}, std::pair{4, 9}})
                for (int radius : {0, 1, 2, 20})
                    for (int k : {1, 4})
                        for (Stored type : kAllStored)
                            for (bool own : {false, true})
                                check_windows(level, height, width, d, type, radius, k, own), ++checked;
        for (int components : {0, 31})
            check(level, 40, 300, 1800, components, Stored::kFloat16, 1, 3, components ? 0 : 5), ++checked;
        std::printf("%s: %d cases checked\n", level.name, checked);
    }
    return failures != 0;
}
