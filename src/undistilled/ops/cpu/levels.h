// Codes of 2 to 6 bits as bytes, and look-ups of a byte for each of 32.
#pragma once
#include "coded.h"

INLINE c32 codes_at(const void* p) { return read<c32>(p); }

// The 32 codes of a block, in their order.
template <int BITS> INLINE c32 codes_of(const uint8_t* w) {
  constexpr int REST = BITS - MAIN[BITS];
  c32 codes = plane<MAIN[BITS]>(w);
  if constexpr (REST > 0) codes = codes | up<MAIN[BITS]>(plane<REST>(w + 4 * MAIN[BITS]));
  return codes;
}
