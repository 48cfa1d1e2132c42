#include "units.hpp"

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

enum Register { kEax, kEbx, kEcx, kEdx };

struct Feature {
    const char* name;
    unsigned leaf, subleaf;
    Register where;
    int bit;
};

constexpr Feature kOsxsave{"xsave", 1, 0, kEcx, 27}, kFma{"fma", 1, 0, kEcx, 12}, kF16c{"f16c", 1, 0, kEcx, 29},
    kAvx2{"avx2", 7, 0, kEbx, 5}, kAvxVnni{"avx_vnni", 7, 1, kEax, 4}, kAvx512f{"avx512f", 7, 0, kEbx, 16},
    kAvx512dq{"avx512dq", 7, 0, kEbx, 17}, kAvx512bw{"avx512bw", 7, 0, kEbx, 30}, kAvx512vl{"avx512vl", 7, 0, kEbx, 31},
    kAvx512vnni{"avx512_vnni", 7, 0, kEcx, 11}, kAmxTile{"amx_tile", 7, 0, kEdx, 24}, kAmxInt8{"amx_int8", 7, 0, kEdx, 25};

// States that the system must save: of 256-bit vectors, of 512-bit vectors, of tiles.
constexpr std::uint64_t kStates256 = 0x6, kStates512 = 0xE6, kStatesTiles = 0x60000;

bool has(const Feature& feature) {
    unsigned registers[4];
    return __get_cpuid_count(feature.leaf, feature.subleaf, &registers[0], &registers[1], &registers[2], &registers[3]) &&
           (registers[feature.where] >> feature.bit & 1);
}

std::string lacks(std::initializer_list<Feature> features, std::uint64_t states) {
    std::string missing;
    for (const Feature& feature : features)
        if (!has(feature)) missing += (missing.empty() ? "" : ", ") + std::string(feature.name);
    if (!missing.empty()) return "the processor has no " + missing;
    if (!has(kOsxsave)) return "the system saves no vectors";
    unsigned low, high;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const std::uint64_t saved = low | static_cast<std::uint64_t>(high) << 32;
    return (saved & states) == states ? "" : "the system does not save what it computes with";
}

// Asks Linux for the tile unit, once for the process and all its threads to come.
std::string ask_for_tiles() {
#ifdef __linux__
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, request, tile_data) == 0) return "";
    return std::string("the system refuses the tile unit: ") + std::strerror(errno);
#else
    return "the tile unit is asked for on Linux only";
#endif
}

std::vector<Unit> look_at_processor() {
    const std::string avx2 = lacks({kFma, kF16c, kAvx2}, kStates256);
    const std::string avxvnni = lacks({kFma, kF16c, kAvx2, kAvxVnni}, kStates256);
    const std::string avx512vnni =
        lacks({kFma, kF16c, kAvx2, kAvx512f, kAvx512dq, kAvx512bw, kAvx512vl, kAvx512vnni}, kStates512);
    std::string amx = lacks({kFma, kF16c, kAvx2, kAvx512f, kAvx512dq, kAvx512bw, kAvx512vl, kAvx512vnni, kAmxTile, kAmxInt8},
                            kStates512 | kStatesTiles);
    if (amx.empty()) amx = ask_for_tiles();
    return {
        {"amx", wide(64), filter_amx, 24 << 10, amx},
        {"avx512vnni", wide(16), filter_avx512vnni, 128 << 10, avx512vnni},
        {"avxvnni", wide(16), filter_avxvnni, 128 << 10, avxvnni},
        {"avx2", narrow(16), filter_avx2, 128 << 10, avx2},
        {"reference", wide(16), filter_reference, 128 << 10, avx2},
    };
}

}  // namespace

const std::vector<Unit>& units() {
    static const std::vector<Unit> all = look_at_processor();
    return all;
}

const Unit* find_unit(const std::string& name) {
    for (const Unit& unit : units())
        if (name == unit.name) return &unit;
    return nullptr;
}

}  // namespace spade
