from .distillation import StudentWithTeacher, find_teacher, load_teacher
from .evaluation import BoxEvaluator, build_evaluator, check_evaluators
from .hooks import BestModelSaver
from .runs import check_output_folder, inference_folder, read_metrics
from .trainer import BFloat16Trainer, Trainer
