"""The colors of heat maps: matplotlib's inferno (CC0), without its ends, as a table.

To look the colors up in matplotlib would make it the slowest thing that a single picture waits for.
"""

from __future__ import annotations

import base64

import numpy as np
import numpy.typing as npt

# Darker colors do not stand out on dark pictures, lighter ones not on white pictures.
PART = (0.3, 0.97)

_TABLE = (
    "Y8P&67jA7BZfzKDZWwNG8E$YHZgLrIa~f@P8f|qOZFU=Nb{lPY9Bq0WZF(GSdmU_j9c+CaY<?bWfFEmsA8UahYl9$bgCJ{#AZmsoYK9?dh#_i;B58>tX^SFh"
    "jU#D|BWaE#XpkgmktJu5C1;Z*XO$*ql_qAECT5r?Wtb;rnJ8qNC}f)`WSl8uo+)FVDPy22VxcQxp(|mdD`BK8V5BTyrYv8lEnlZCU#Tu$t1exuE?ulIT&^%%"
    "t}t7#F<Y@QTCp)&vNBn;Gg!1UShX`(w=`C_G*-AZR=PG-x;9n2H&nehQ@uA+zBp39IZ?kkQNcP;!aGmGJ5R(sPQ^V<#XU{OK1|3yOUXY<$v;ZVKuOF&NX$V<"
    "%|b`dL`Kg<M$kn>(MChjMnlp^Lexk>)JQ?qNkG<0Kh{b=*GoRxO+DF7J=#t?+fO>%PdeOCIo(n?-BLK-Q#apKHs4e>;8rx^S2N;QGvin?<XSQ0S~2BYFy>q?"
    "=3Fl3UM=TeEazV==wU1AVk+rkD(Yk?>t!eFWhd-sChce??Pw+KY9sD!BJOM=?`<LQZy)e*9`JA;@p2vVbR6<@9P)J<^LH8ZcNz0}81#A;^m-Qcd=>S66!m@-"
    "_J9)hff4qB5%+@-_k|Akg%0?K4fu!*_=pVniVOLS3Hgi(`Hl$rkO=vZ2>Ou+`jZCwlLq>g2Ktu<`j-a#nFjlt2K$=^`<({+o(KD$2m7E0`=SW@q6qt>3j3xD"
    "`=$%~s15t74*RMO`>YWAt`hsM68o?e`>_`Lu@?KY82hyv`?nnXw;cPq9{Rf>`nw_ey(9X+CHlW5`oSpq!z%g1D*44M`NuE$$1nKFG5E_g_{%i-%{TYYI`_{y"
    "_t8A|(?9mpKlar^_18u9*G2W&Nc7uF^xI4H+)wk~QuE$Y^WawV;#u?JS@Psv^5$Uj=3w#YWbx@}@#$#s>umAuaPjSM@$Pi-@Okm@dGYdn^7Dc6^MUg8h4c1_"
)


def colors() -> npt.NDArray[np.uint8]:
    """256 RGB colors, (256, 3), from the lowest score to the highest."""
    return np.frombuffer(base64.b85decode(_TABLE), np.uint8).reshape(256, 3)
