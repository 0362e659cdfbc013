"""The 100 instance classes of ADE20K, a row each: instance id, SceneParse150 id, indices in the full ADE20K, name.

From the instance challenge's ``categoryMapping.txt`` (github.com/CSAILVision/placeschallenge, BSD 3-Clause). Three
classes (door, wardrobe, booth) gather two of the full set's.
"""

from __future__ import annotations

_TABLE = """
1 8 165 bed
2 9 3055 windowpane
3 11 350 cabinet
4 13 1831 person
5 15 774/783 door
6 16 2684 table
7 19 687 curtain
8 20 471 chair
9 21 401 car
10 23 1735 painting
11 24 2473 sofa
12 25 2329 shelf
13 28 1564 mirror
14 31 57 armchair
15 32 2272 seat
16 33 907 fence
17 34 724 desk
18 36 2985/533 wardrobe
19 37 1395 lamp
20 38 155 bathtub
21 39 2053 railing
22 40 689 cushion
23 42 266 box
24 43 581 column
25 44 2380 signboard
26 45 491 chest of drawers
27 46 627 counter
28 48 2388 sink
29 50 943 fireplace
30 51 2096 refrigerator
31 54 2530 stairs
32 56 420 case
33 57 1948 pool table
34 58 1869 pillow
35 59 2251 screen door
36 63 239 bookcase
37 65 571 coffee table
38 66 2793 toilet
39 67 978 flower
40 68 236 book
41 70 181 bench
42 71 629 countertop
43 72 2598 stove
44 73 1744 palm
45 74 1374 kitchen island
46 75 591 computer
47 76 2679 swivel chair
48 77 223 boat
49 79 47 arcade machine
50 81 327 bus
51 82 2821 towel
52 83 1451 light
53 84 2880 truck
54 86 480 chandelier
55 87 77 awning
56 88 2616 streetlight
57 89 246/247 booth
58 90 2733 television receiver
59 91 14 airplane
60 93 38 apparel
61 94 1936 pole
62 96 120 bannister
63 98 1702 ottoman
64 99 249 bottle
65 103 2928 van
66 104 2337 ship
67 105 1023 fountain
68 108 2989 washer
69 109 1930 plaything
70 111 2586 stool
71 112 131 barrel
72 113 146 basket
73 116 95 bag
74 117 1563 minibike
75 119 1708 oven
76 120 103 ball
77 121 1002 food
78 122 2569 step
79 124 2833 trade name
80 125 1551 microwave
81 126 1981 pot
82 127 29 animal
83 128 187 bicycle
84 130 747 dishwasher
85 131 2254 screen
86 133 2262 sculpture
87 134 1260 hood
88 135 2243 sconce
89 136 2932 vase
90 137 2836 traffic light
91 138 2850 tray
92 139 64 ashcan
93 140 894 fan
94 143 1919 plate
95 144 1583 monitor
96 145 318 bulletin board
97 147 2046 radiator
98 148 1098 glass
99 149 530 clock
100 150 954 flag
"""

ROWS: tuple[tuple[int, int, tuple[int, ...], str], ...] = tuple(
    (int(instance), int(scene), tuple(map(int, full.split("/"))), name)
    for instance, scene, full, name in (line.split(" ", 3) for line in _TABLE.strip().splitlines())
)
