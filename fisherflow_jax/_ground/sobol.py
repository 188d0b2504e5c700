r"""A fixed set of quasi-random points of the standard normal in up to 63 dimensions.

Each dimension of a digital net is a matrix over GF(2) and a shift: point i is the
shift, xor those columns whose bit is set in i. These are Sobol's sequence with the
directions of Joe and Kuo, scrambled once by scipy 1.17, `scipy.stats.qmc.Sobol(63,
bits=10, rng=numpy.random.default_rng(0))`. They are written down so that all versions
predict the same, and since to import scipy.stats takes a second.

References:
  I. M. Sobol, "On the distribution of points in a cube and the approximate evaluation
  of integrals", 1967.
  S. Joe and F. Y. Kuo, "Constructing Sobol sequences with better two-dimensional
  projections", 2008.
  J. Matousek, "On the L2-discrepancy for anchored boxes", 1998: the scrambling.
"""

import functools
import statistics

import numpy as np

_BITS = 10
NUM_POINTS = 2**_BITS
# A dimension a line: the shift, and ten columns, three hexadecimal digits each.
_NET = """
13338d1120f205402a01c008005003001
3272ac3db25236429c3ff26f34a2ae3d8
1a32ab3cb19b2fc30b11b28d3db1a22d3
14a3092ac0ef1fd2291073ef35c2c40ff
10921b1ac0a72d63433fa1562501f208a
3db2731ec17a0ce3b208f1a137630b123
1462ae3852143de1482eb0cd3312600b6
0f43b519337a1ee3920df0700fc13e3f3
36e2df11422114f0d538f1cc1b408d165
3952d51b338e24c2952be2ed1fe097320
2c53ee14434b0750221db3af0ad122375
2a72491ee0ef0881ad2962350c23d6023
22822437e2c413d3cd20239208d02e0e7
2b137d2e31583250a02f41953b727938f
1072271900a03632ba1fe26327005d1c1
1a33592640b722321227512334c3f81d1
3ff34b10e0d32c90bb0432df1cc36f150
2963e52160a12fb16b1410f317e1f72b6
1ca23c13e2e515627c3aa2de2a83cc248
3563eb25028a35e37108126f1be0dd1d2
0923982552b32391070be3bb1a435520b
16a34b17319524d0a53691ce1e620d016
1e32f23e520b2ba03c1f91dc2c92193d1
3d020837609232214522f3350f93390cc
3522e93ba0a91343e63600e829d2cb0e7
35622315b2fb2a02462e41e933a00c182
0012523e12ac08b04709026c20915f25f
1962241ff3693bd0351d000c2ec0c13d5
0ff3f928422412d1f814b19026f0ef2ce
26a3491871143382f01721fc00e26f132
0482fa39220c3f025f0191b928b30b34a
3d72d836e38709017f3b90e40c008129a
09427c3d30df0800fd39c25436c26e121
08621c1902821d22e220606d2b02fc3fe
3ed3a315c25518902823623c3852d013a
3d221c1613b82511933ea1ac3141d931d
03b34d22e18211e05626c1680860e32b6
32032e28508d2522720c912924a38026e
0e420a3e72d737834e31c15c13718b321
2e13bf26c0953481990ab3fb2b60ca344
2432633490d32cf31c28c25502c2282b5
1c12b81d43bf3d92460ea2660ec3293f3
2fb2063dc3080b93f215d2081ee28c330
2772793b30c80772280f401438b252059
1622df1f220c2982a41ad0a02b914914e
1593d12752ce31d02e3cd315336324199
3ef22836d1bd0bc1d40ec25a15a1a03cf
3853132282ba3d01c936129306f214226
03e2d91bf1360581d114e36a3eb027322
29936d1660e20ad3fe3a31c73c700824a
0f52c53003ca1592ed1d91e51d73671cc
00524732f0c512e3473973b03782f00ff
0063d913f1dc14116f3031f83cb259316
3cf2053592ff13a38e1401042ca39a18a
19824d36a1f92e00520103320240d6394
26e24e10c0d917026e2070e20102be048
07e29e32b0831e83020ea0e01263d831e
30b3c51fd08531f1861e911a15918c256
03f2461702852d414c1f833a3e72c92e5
10022b1df2a033a2462f219401d2d21bd
02a2b534d3ee11939a1d020528717c078
03b23a16b0c70942820ad3353330ee09b
3ba3271b83922c22440cd12706b1e62a2
"""
MOST_DIMENSIONS = len(_NET.split())


def digits(num_dimensions: int) -> np.ndarray:
    """The net, whole numbers `(1024, d)`: in each dimension each below 1024 once."""
    lines = _NET.split()[:num_dimensions]
    table = np.array(
        [[int(line[i : i + 3], 16) for i in range(0, len(line), 3)] for line in lines],
        np.int32,
    ).reshape(num_dimensions, 1 + _BITS)
    points = np.broadcast_to(table[:, 0], (NUM_POINTS, num_dimensions)).copy()
    index = np.arange(NUM_POINTS, dtype=np.int32)[:, None]
    for bit in range(_BITS):
        points ^= (index >> bit & 1) * table[:, 1 + bit]
    return points


@functools.lru_cache(maxsize=16)
def normal_points(num_dimensions: int) -> np.ndarray:
    """Points `(1024, d)` of the standard normal, of mean zero and covariance one.

    The middles of the net's cells through the normal quantile. What little their
    covariance is off is put right, so that averages of quadratics are exact.
    """
    quantile = statistics.NormalDist().inv_cdf
    middles = (np.arange(NUM_POINTS) + 0.5) / NUM_POINTS
    points = np.array([quantile(u) for u in middles])[digits(num_dimensions)]
    root = np.linalg.cholesky(points.T @ points / NUM_POINTS)
    return np.linalg.solve(root, points.T).T
