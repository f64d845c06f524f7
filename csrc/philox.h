// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11), as fastpeft uses it:
// key = seed (low word, high word). An element's counter is (column / 4, row low, projection, row high), its word the
// (column % 4)th of the block's four; it is kept where word >= ceil(p * 2^32). Row and column are those of the [M, K]
// matrix that the mask falls on: with all four words used, and no block across two rows, a mask costs a quarter of one
// block for each element.
//
// One round of (c0, c1, c2, c3) under the key (k0, k1), which grows by (W0, W1) from round to round:
//   c0' = hi(M1 * c2) ^ c1 ^ k0    c1' = lo(M1 * c2)    c2' = hi(M0 * c0) ^ c3 ^ k1    c3' = lo(M0 * c0)
#pragma once
#include <stdint.h>

namespace philox {

constexpr uint32_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t W0 = 0x9E3779B9u, W1 = 0xBB67AE85u;  // key increments
constexpr int ROUNDS = 10;

}  // namespace philox
