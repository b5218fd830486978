// Counter-based random numbers: Philox-4x32-10 (Salmon et al., SC 2011). The numbers of a row depend only on the seed
// and the index of the row, so they are the same for any number of threads or blocks and on any device.
#pragma once

#include "common/types.h"

namespace sedd {

struct Uniforms {
    double first;   // in [0, 1), 53 bits
    double second;  // independent of the first
};

SEDD_HD double to_uniform53(uint32_t high, uint32_t low) {
    const uint64_t bits = (static_cast<uint64_t>(high) << 21) | (low >> 11);
    return static_cast<double>(bits) * (1.0 / 9007199254740992.0);
}

// `draw` counts the draws of a row that takes several.
SEDD_HD Uniforms row_uniforms(uint64_t seed, uint64_t row, uint64_t draw = 0) {
    uint32_t c0 = static_cast<uint32_t>(row), c1 = static_cast<uint32_t>(row >> 32);
    uint32_t c2 = static_cast<uint32_t>(draw), c3 = static_cast<uint32_t>(draw >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
        const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
        const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {to_uniform53(c0, c1), to_uniform53(c2, c3)};
}

}  // namespace sedd
