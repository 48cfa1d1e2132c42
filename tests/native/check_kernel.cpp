// Checks every unit that this processor runs: filters bit by bit against the reference, searches against brute force in double.
//
// Exits with 1 and says what differs, or prints what was checked. Built by tests/test_native_kernel.py with sanitizers; a
// processor that is emulated can run it, too (link it statically).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "search.hpp"

using namespace spade;

namespace {

std::mt19937 rng(1);
int failures = 0;

void fail(const char* unit, const char* what, int nq, int nb, int d) {
    std::printf("%s: %s (%d queries, %d rows, %d channels)\n", unit, what, nq, nb, d);
    ++failures;
}

std::uint16_t to_half(float value) {  // of normal, finite numbers: cuts off
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
    if (exponent <= 0) return 0;
    return static_cast<std::uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023));
}

float from_half(std::uint16_t half) {
    const float value = std::ldexp(static_cast<float>(half & 1023) + (half >> 10 & 31 ? 1024.0f : 0.0f), (half >> 10 & 31) - 25);
    return half & 0x8000 ? -value : value;
}

struct Set {
    std::vector<char> memory;
    Vectors vectors;
    std::vector<float> values;
};

// Vectors around a few centers, so that near ones, equal ones and far ones are among them; at an odd address.
Set make(int count, int d, Type type, float scale, const std::vector<float>& centers) {
    std::normal_distribution<float> normal;
    std::uniform_int_distribution<int> pick(0, 3), kind(0, 9);
    Set set;
    set.values.resize(static_cast<std::size_t>(count) * d);
    for (int i = 0; i < count; ++i) {
        const int center = pick(rng), what = kind(rng);
        const float spread = what == 0 ? 0.0f : what == 1 ? 3.0f : what == 2 ? 1e-4f : 0.2f;
        for (int c = 0; c < d; ++c) {
            float value = scale * (centers[static_cast<std::size_t>(center) * d + c] + spread * normal(rng));
            if (type == Type::kFloat16) value = from_half(to_half(value));
            set.values[static_cast<std::size_t>(i) * d + c] = value;
        }
    }
    const std::size_t size = type == Type::kFloat16 ? 2 : 4;
    set.memory.resize(set.values.size() * size + 1);
    for (std::size_t i = 0; i < set.values.size(); ++i) {
        const std::uint16_t half = to_half(set.values[i]);
        std::memcpy(set.memory.data() + 1 + i * size, type == Type::kFloat16 ? static_cast<const void*>(&half) : &set.values[i], size);
    }
    set.vectors = {set.memory.data() + 1, type, count, d};
    return set;
}

double exact(const float* a, const float* b, int d) {
    double total = 0;
    for (int c = 0; c < d; ++c) total += (static_cast<double>(a[c]) - b[c]) * (static_cast<double>(a[c]) - b[c]);
    return total;
}

// Orthonormal rows, by Gram and Schmidt.
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

void check(const Unit& unit, int nq, int nb, int d, int components, Type type, float scale, int k) {
    std::normal_distribution<float> normal;
    std::vector<float> centers(static_cast<std::size_t>(4) * d), center(d);
    for (float& value : centers) value = 1 + normal(rng);
    for (float& value : center) value = scale;
    const Set rows = make(nb, d, type, scale, centers);
    const Set queries = make(nq, d, Type::kFloat32, scale, centers);
    const Vectors xq{queries.values.data(), Type::kFloat32, nq, d};
    const std::vector<float> basis = make_basis(components, d);
    const auto packing = std::make_shared<Packing>(unit.format, d, center.data(), basis.data(), components);
    const RowPack row_pack(packing, rows.vectors);
    const QueryPack query_pack(packing, queries.vectors);

    const Range all{0, row_pack.groups};
    std::vector<float> minima(static_cast<std::size_t>(query_pack.panels) * row_pack.groups * kPanel, -1), same(minima.size(), -2);
    unit.filter(row_pack, all, query_pack, minima.data());
    filter_reference(row_pack, all, query_pack, same.data());
    if (std::memcmp(minima.data(), same.data(), minima.size() * sizeof(float)) != 0) fail(unit.name, "the filter differs from the reference", nq, nb, d);

    for (int round = 0; round < 2; ++round) {
        std::vector<float> bound(nq, std::numeric_limits<float>::infinity()), D(static_cast<std::size_t>(nq) * k);
        std::vector<std::int64_t> I(D.size());
        if (round == 1)
            for (float& value : bound) value = scale * scale * static_cast<float>(d) * 0.05f;
        search(unit, query_pack, xq, row_pack, rows.vectors, bound.data(), k, 1, D.data(), I.data());
        for (int i = 0; i < nq; ++i) {
            const float* q = queries.values.data() + static_cast<std::size_t>(i) * d;
            std::vector<std::pair<float, std::int64_t>> best;
            for (int row = 0; row < nb; ++row) {
                const float found = direct_sq_dist(q, rows.vectors.row(row), type, d);
                const double truth = exact(q, rows.values.data() + static_cast<std::size_t>(row) * d, d);
                if (std::fabs(found - truth) > 1e-5 * truth + 1e-30) fail(unit.name, "a direct distance is off", nq, nb, d);
                if (found <= bound[i]) best.emplace_back(found, row);
            }
            std::sort(best.begin(), best.end());
            best.resize(k, {std::numeric_limits<float>::infinity(), -1});
            for (int j = 0; j < k; ++j) {
                const std::size_t at = static_cast<std::size_t>(i) * k + j;
                if (D[at] != best[j].first || I[at] != best[j].second) {
                    fail(unit.name, round ? "a bounded search is wrong" : "a search is wrong", nq, nb, d);
                    return;
                }
            }
        }
    }
}

}  // namespace

int main() {
    for (const Unit& unit : units()) {
        if (!unit.why_not.empty()) {
            std::printf("%s: not here: %s\n", unit.name, unit.why_not.c_str());
            continue;
        }
        int checked = 0;
        for (int d : {1, 17, 40, 64, 130})
            for (int nb : {1, 5, 8, 17, 50})
                for (int nq : {1, 33})
                    for (int k : {1, 4})
                        for (Type type : {Type::kFloat16, Type::kFloat32}) {
                            const float scale = type == Type::kFloat32 && d % 2 ? 1e6f : 1.0f;
                            check(unit, nq, nb, d, 0, type, scale, std::min(k, nb)), ++checked;
                            if (d > 3) check(unit, nq, nb, d, d / 4, type, scale, std::min(k, nb)), ++checked;
                        }
        for (int components : {0, 31}) check(unit, 40, 300, 1800, components, Type::kFloat16, 1, 3), ++checked;
        std::printf("%s: %d cases checked\n", unit.name, checked);
    }
    return failures != 0;
}
