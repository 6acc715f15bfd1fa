from .distillation import StudentWithTeacher, find_teacher, load_teacher
from .evaluation import BoxEvaluator, build_evaluator, check_evaluators
from .hooks import BestModelSaver
from .runs import check_output_folder, claim_output_folder, inference_folder, read_metrics
from .steps import BFloat16Trainer
from .trainer import Trainer
