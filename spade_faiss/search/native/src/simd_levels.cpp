#include "simd_levels.hpp"

#include <cpuid.h>

#include <cerrno>
#include <cstring>
#include <initializer_list>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace spade {
namespace {

enum CpuidRegister { kEax, kEbx, kEcx, kEdx };

// Where CPUID says whether the processor has a feature.
struct Feature {
    const char* name;
    unsigned leaf, subleaf;
    CpuidRegister cpuid_register;
    int bit;
};

constexpr Feature kOsxsave{"xsave", 1, 0, kEcx, 27};
constexpr Feature kFma{"fma", 1, 0, kEcx, 12};
constexpr Feature kF16c{"f16c", 1, 0, kEcx, 29};
constexpr Feature kAvx2{"avx2", 7, 0, kEbx, 5};
constexpr Feature kAvxVnni{"avx_vnni", 7, 1, kEax, 4};
constexpr Feature kAvx512f{"avx512f", 7, 0, kEbx, 16};
constexpr Feature kAvx512dq{"avx512dq", 7, 0, kEbx, 17};
constexpr Feature kAvx512bw{"avx512bw", 7, 0, kEbx, 30};
constexpr Feature kAvx512vl{"avx512vl", 7, 0, kEbx, 31};
constexpr Feature kAvx512vnni{"avx512_vnni", 7, 0, kEcx, 11};
constexpr Feature kAmxTile{"amx_tile", 7, 0, kEdx, 24};
constexpr Feature kAmxInt8{"amx_int8", 7, 0, kEdx, 25};

// Bits of XCR0: the registers that the operating system saves when it switches threads.
constexpr std::uint64_t kState256 = 0x6, kState512 = 0xE6, kStateTiles = 0x60000;

bool has(const Feature& feature) {
    unsigned registers[4];
    return __get_cpuid_count(feature.leaf, feature.subleaf, &registers[0], &registers[1], &registers[2], &registers[3]) &&
           (registers[feature.cpuid_register] >> feature.bit & 1);
}

// Why instructions with these features and registers do not run here; empty if they do.
std::string why_unsupported(std::initializer_list<Feature> features, std::uint64_t states) {
    std::string missing;
    for (const Feature& feature : features)
        if (!has(feature)) missing += (missing.empty() ? "" : ", ") + std::string(feature.name);
    if (!missing.empty()) return "the processor has no " + missing;
    if (!has(kOsxsave)) return "the system does not save vector registers";
    unsigned low, high;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const std::uint64_t saved = low | static_cast<std::uint64_t>(high) << 32;
    return (saved & states) == states ? "" : "the system does not save the registers that it computes with";
}

// Asks Linux for AMX tiles, for this process and all of its threads to come. Returns why it refuses; empty if it does not.
std::string request_tiles() {
#ifdef __linux__
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, request, tile_data) == 0) return "";
    return std::string("the system refuses AMX tiles: ") + std::strerror(errno);
#else
    return "AMX tiles are supported on Linux only";
#endif
}

std::vector<SimdLevel> detect() {
    const std::string avx2 = why_unsupported({kFma, kF16c, kAvx2}, kState256);
    const std::string avxvnni = why_unsupported({kFma, kF16c, kAvx2, kAvxVnni}, kState256);
    const std::string avx512vnni =
        why_unsupported({kFma, kF16c, kAvx2, kAvx512f, kAvx512dq, kAvx512bw, kAvx512vl, kAvx512vnni}, kState512);
    std::string amx =
        why_unsupported({kFma, kF16c, kAvx2, kAvx512f, kAvx512dq, kAvx512bw, kAvx512vl, kAvx512vnni, kAmxTile, kAmxInt8},
                        kState512 | kStateTiles);
    if (amx.empty()) amx = request_tiles();
    return {
        {"amx", eight_bit_codes(64), filter_amx, screen_amx, estimate_rows_avx512vnni, screen_windows_avx512vnni, 127, 24 << 10,
         amx},
        {"avx512vnni", eight_bit_codes(4), filter_avx512vnni, screen_avx512vnni, estimate_rows_avx512vnni,
         screen_windows_avx512vnni, 127, 128 << 10, avx512vnni},
        {"avxvnni", eight_bit_codes(4), filter_avxvnni, screen_avxvnni, estimate_rows_avx2, screen_windows_avxvnni, 127,
         128 << 10, avxvnni},
        {"avx2", six_bit_codes(16), filter_avx2, screen_avx2, estimate_rows_avx2, screen_windows_avx2, 63, 128 << 10, avx2},
        {"reference", eight_bit_codes(4), filter_reference, screen_reference, estimate_rows_avx2, screen_windows_reference, 127,
         128 << 10, avx2},
    };
}

}  // namespace

const std::vector<SimdLevel>& simd_levels() {
    static const std::vector<SimdLevel> levels = detect();
    return levels;
}

const SimdLevel* find_simd_level(const std::string& name) {
    for (const SimdLevel& level : simd_levels())
        if (name == level.name) return &level;
    return nullptr;
}

}  // namespace spade
