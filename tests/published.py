"""Small trees in the exact form of the published data sets: folders, lists and names."""

import json
import pathlib

import numpy as np
import soundfile

RATE = 16000
ESC = "filename,fold,target,category,esc10,src_file,take\n"
MIDS = {"/m/09x0r": "Speech", "/m/068hy": "Domestic animals, pets", "/t/dd00088": "Gargling"}
AUDIOSET = (
    "# Segments csv created Sun Mar  5 10:54:31 2017\n"
    "# num_ytids=22160, num_segs=22160, num_unique_labels=527, num_positive_labels=52882\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
)
EPIC = (
    "annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,start_sample,"
    "stop_sample,description,class,class_id\n"
)
EPIC_TRAIN = EPIC + (
    "P01_01_0,P01,P01_01,00:00:00.250,00:00:01.000,6000,24000,paper rustle,rustle,1\n"
    'P01_01_1,P01,P01_01,00:00:01.000,00:00:01.500,24000,36000,"tap, off",water,0\n'
)
EPIC_VALIDATION = EPIC + "P02_03_0,P02,P02_03,00:00:00.500,00:00:01.000,12000,24000,,rustle,1\n"


def fill(root, files):
    """Write files: text, or empty where the text is None; `load_source` opens no sound file."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or "", encoding="utf-8")
    return root


def lines(*rows):
    return "".join(f"{row}\n" for row in rows)


def esc50(root):
    names = [f"{fold}-10{fold}{target}-A-{target}.wav" for fold in range(1, 6) for target in (0, 3)]
    rows = [
        f"{name},{name[0]},{name[-5]},{'dog' if name[-5] == '0' else 'axe'},True,1,A"
        for name in names
    ]
    files = {f"audio/{name}": None for name in names}
    return fill(root, {"meta/esc50.csv": ESC + lines(*rows), "README.md": None, **files})


def speech_commands(root):
    clips = [f"{word}/{n}_nohash_0.wav" for word in ("yes", "bed") for n in ("a1", "b2", "c3")]
    files = dict.fromkeys([*clips, "_background_noise_/running_tap.wav", "LICENSE"])
    files["validation_list.txt"] = lines("bed/b2_nohash_0.wav", "yes/b2_nohash_0.wav")
    files["testing_list.txt"] = lines("bed/c3_nohash_0.wav", "yes/c3_nohash_0.wav")
    return fill(root, files)


def class_labels(order=tuple(MIDS)):
    rows = (f'{n},{mid},"{MIDS[mid]}"' for n, mid in enumerate(order))
    return "index,mid,display_name\n" + lines(*rows)


def audioset(root):
    train = [f"{n:02}xxxxxxxx{n % 7}" for n in range(20)]
    balanced = lines(*(f'{one}, 30.000, 40.000, "/m/09x0r,/t/dd00088"' for one in train))
    names = {f"balanced_train_segments/Y{one}.wav": None for one in train}
    names |= {
        "unbalanced_train_segments/part00/-aPJHxphWEs_30000_40000.flac": None,
        "eval_segments/--4gqARaEJE_0.000.flac": None,
        "eval_segments/.--4gqARaEJE_0.000.flac": None,
    }
    return fill(
        root,
        {
            "class_labels_indices.csv": class_labels(),
            "balanced_train_segments.csv": AUDIOSET + balanced,
            "unbalanced_train_segments.csv": AUDIOSET + '-aPJHxphWEs, 30.000, 40.000, "/m/068hy"\n',
            "eval_segments.csv": AUDIOSET + '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/09x0r"\n',
            **names,
        },
    )


def vggsound(root):
    rows = [f"{n:02}g-f_I2yQ-,{n},people marching,train" for n in range(20)]
    rows += ['--0PQM4-hqg,30,"cat, wild",train', '--x,250,"cat, wild",test']
    names = [f"{row.split(',')[0]}_{int(row.split(',')[1]):06d}.wav" for row in rows]
    files = {f"audio/{name}": None for name in names}
    return fill(root, {"vggsound.csv": lines(*rows), **files})


def voxceleb1(root):
    rows = [
        f"{split} id1000{speaker}/{'7gWzIy6yIIk' if split == 3 else '1zcIwhmdeo4'}/0000{split}.wav"
        for speaker in (2, 1)
        for split in (1, 2, 3)
    ]
    files = {f"wav/{row.split()[1]}": None for row in rows}
    return fill(root, {"iden_split.txt": lines(*rows), **files})


def epic_sounds(root, train=EPIC_TRAIN, validation=EPIC_VALIDATION):
    lists = {"EPIC_Sounds_train.csv": train, "EPIC_Sounds_validation.csv": validation}
    return fill(root, {**lists, "P01/P01_01.wav": None, "P02/P02_03.flac": None})


def manifest(*clips):
    return json.dumps({"data": [{"wav": wav, "labels": labels} for wav, labels in clips]})


def ast(root):
    train = [(f"../audio/{n}.flac", "/m/09x0r") for n in range(20)]
    train[5] = ("../audio/5.flac", "/t/dd00088")
    train.append(("../audio/both.flac", "/m/068hy,/m/09x0r"))
    files = {f"audio/{n}.flac": None for n in [*range(20), "both", "test"]}
    return fill(
        root,
        {
            "class_labels_indices.csv": class_labels(),
            "datafiles/bal_train_data.json": manifest(*train),
            "datafiles/bal_train_data_weight.csv": lines(*(f"{n / 8:.18e}" for n in range(21))),
            "datafiles/eval_data.json": manifest(("../audio/test.flac", "/t/dd00088")),
            **files,
        },
    )


MAKERS = {
    "esc50": esc50,
    "speech-commands": speech_commands,
    "audioset": audioset,
    "vggsound": vggsound,
    "voxceleb1": voxceleb1,
    "epic-sounds": epic_sounds,
    "ast": lambda root: ast(root) / "datafiles",
}


def write_sounds(root, rate=RATE, seconds=0.5):
    """Sound in every empty sound file of a tree: noise around a tone of its own."""
    rng, times = np.random.default_rng(0), np.arange(round(seconds * rate)) / rate
    for path in sorted(pathlib.Path(root).rglob("*")):
        if path.suffix in (".wav", ".flac") and not path.stat().st_size:
            tone = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 4000) * times)
            soundfile.write(path, tone + rng.normal(0, 0.02, times.size), rate)
